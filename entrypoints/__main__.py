"""`python -m tetrion.entrypoints`: the console command, wherever its script was installed."""

from tetrion.entrypoints.cli import main

if __name__ == "__main__":
    main()
