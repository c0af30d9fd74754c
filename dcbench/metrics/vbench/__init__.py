"""The dimensions of VBench-I2V (arXiv 2411.13503), each a metric with its name there.

Facts and constants are those of the benchmark's code (Vchitect/VBench, 2026-03). docs/metrics.md says how far apart the
numbers of both are.
"""
