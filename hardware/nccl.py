"""One GPU for each rank: NCCL sends weights and gradients from card to card, through CuPy.

NCCL adds in an order of its own. Two cards have not run this yet; `python train.py --demo --device gpu --processes 2`
tries it.
"""
from hardware import device
from hardware.device import Unavailable
from hardware.ranks import Team


class Nccl(Team):
    """The ranks of another team, whose pipes carry everything except the arrays."""

    def __init__(self, team):
        from cupy.cuda import nccl
        if not nccl.available:
            raise Unavailable('several GPUs need NCCL: pip install "nvidia-nccl-cu12>=2.18.1,<3"')
        super().__init__(team.rank, team.size, team.here, team.local_rank, team.pipes)
        key = self.exchange(nccl.get_unique_id() if self.rank == 0 else None)[0]
        self.nccl, self.cards = nccl, nccl.NcclCommunicator(self.size, key, self.rank)

    def arrays(self, n):
        return device.xp.zeros(n, "float32"), device.xp.zeros(n, "float32")

    def spread(self):
        self.cards.bcast(self.flat.data.ptr, self.flat.size, self.nccl.NCCL_FLOAT32, 0, self.stream())

    def sum(self, value):
        if not isinstance(value, device.xp.ndarray):
            return super().sum(value)
        total = value.astype("float32")             # a copy: it becomes the sum, for which nobody waits
        self.cards.allReduce(total.data.ptr, total.data.ptr, total.size, self.nccl.NCCL_FLOAT32, self.nccl.NCCL_SUM,
                             self.stream())
        return total

    def add_up(self, value):
        value, start = self.sum(device.xp.asarray(value)), self.grad.data.ptr
        # In place: the result is the rank's own slice.
        self.cards.reduceScatter(start, start + 4 * self.rank * self.part, self.part, self.nccl.NCCL_FLOAT32,
                                 self.nccl.NCCL_SUM, self.stream())
        return value

    def share_weights(self):
        start = self.flat.data.ptr
        self.cards.allGather(start + 4 * self.rank * self.part, start, self.part, self.nccl.NCCL_FLOAT32, self.stream())

    def stream(self):
        return device.xp.cuda.get_current_stream().ptr
