"""One machine as a graph: GPUs, NICs, NUMA nodes, the links between them, and what follows for placing ranks.

from ch01_intro.topology import advise, detect

machine = detect()                      # this machine; detect(Path("recorded")) for one that was recorded
machine.link("GPU0", "GPU1")            # NV18, PIX, PXB, PHB, NODE or SYS
advise(machine).best_group              # [0, 1, 2, 3, 4, 5, 6, 7]
"""

from .advise import Advice, advise
from .detect import detect, record
from .model import Cpu, Gpu, Machine, Nic, NumaNode, link_rank, nvlinks

__all__ = ["Advice", "Cpu", "Gpu", "Machine", "Nic", "NumaNode", "advise", "detect", "link_rank", "nvlinks", "record"]
