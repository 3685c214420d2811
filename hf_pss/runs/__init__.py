"""The package through which all other code reads and writes the folder of a run.

- `folder` defines the names of files and checkpoints, and the size limits of files. It writes files
  and folders completely or not at all. No other module does this.
- `records_files` reads the log of the Trainer from trainer_state.json, and writes and reads the
  events and health readings of PSS.
- `options` reads how `hf-pss train` was started.
- `checkpoint` decides whether a checkpoint is complete, and writes its marker. No other
  module does this. It also decides which checkpoints belong to a run and which ones are removed.
- `safetensors_files` reads weights in pieces.
- `follow` follows a live run.
"""
