"""The server of semid: the quantiser, its checkpoints, exact encoding, and serving."""
