"""What lies between the engine process and each worker process: shared memory, wake-ups, messages, pictures.

`segment` shared memory without a name · `available_memory` how much may be asked for · `doorbell` a wake-up ·
`ring` a byte queue for one producer and one consumer · `channel` typed commands down, typed events up ·
`image_slab` slots in which pictures come back.

Nothing here knows what a command means, what a request is, or that torch exists.
"""
