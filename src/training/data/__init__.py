"""Training data: shards, csv files or synthetic samples as batches, the same number on every rank.

The parts, in the order data goes through them: config (flags), shards and sizes (what there is), plan (who reads
what), streams (opened, and tried again), tar_members (walked through), read and tables (raw samples), shuffle (their order),
samples (one sample), pictures (decoded, cropped, resized), tokens (captions), stream (batches, in a worker process), loader
(the whole). For an epoch that goes on after a checkpoint: progress (how far workers have come), segments (what is left,
under which layout), runs (of positions). Beside them: preflight (checks before training), index (the command that writes
sizes.json; its parts: keys, key_writer, key_set, verify, shard_pool), report (what was left out), timeout (an end to waiting),
workers (how their processes begin) and stages (where the time goes, if asked).
"""

from training.data.config import Batch, DataConfig
from training.data.loader import TrainLoader, build_train_loader
from training.data.preflight import check_train_data
from training.data.stream import NoUsableSamplesError

__all__ = ["Batch", "DataConfig", "NoUsableSamplesError", "TrainLoader", "build_train_loader", "check_train_data"]
