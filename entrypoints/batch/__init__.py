"""`tetrion batch`: a file of requests in, a folder of pictures and a manifest out."""
