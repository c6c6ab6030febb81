"""What a parallel layout costs, computed: memory a GPU, bytes on the wire, seconds a step; and the search for the best.

from ch02_hardware_parallelism.layout import Cluster, Job, Layout, find_shape, rank

job = Job(find_shape("llama-8b"), Cluster.of("h100-80g", gpus=8), seq_len=8192, batch=64)
plan(job, Layout(dp=8, zero=3)).memory       # {"weights": ..., "gradients": ..., ...} bytes a GPU
rank(job).winner                             # the fastest plan that fits
"""

from .cluster import GPUS, Cluster
from .cost import Plan, plan
from .job import FP32, MIXED, Job, Layout
from .search import Advice, rank
from .shape import Shape, find_shape

__all__ = ["FP32", "GPUS", "MIXED", "Advice", "Cluster", "Job", "Layout", "Plan", "Shape", "find_shape", "plan", "rank"]
