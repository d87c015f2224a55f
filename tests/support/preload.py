"""What the fork server imports before it forks the first process: nothing here may start a thread that computes."""

# ruff: noqa: F401
import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # threads of a parent do not live on in a fork

import pyarrow.compute
import torch._dynamo  # which optimizers and DDP import when they are made
import torch.distributed.run

import genkd.benchmarks.soak_rank
import genkd.cli
import genkd.evaluation.report
import genkd.pipelines.loader
import genkd.preprocessing.convert
import genkd.trainers.loop

gc.freeze()  # what all forks share is neither looked at nor copied by their collections
