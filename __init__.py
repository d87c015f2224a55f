"""genkd: shard videos, feed them to GPUs at decode-engine speed, distil action recognition networks."""

__version__ = "0.1.0"
