"""YOSO on CPUs: a kernel writes and reads the hash tables."""

from thresher.attention.backends import Implementation
from thresher.attention.contract import Attended
from thresher.attention.prepared import Prepared
from thresher.attention.yoso import kernel
from thresher.attention.yoso.mechanism import Yoso


class YosoOnCpu(Implementation[Yoso]):
    """The kernel `yoso`, forward and backward."""

    kernel = "yoso"

    def explain_refusal(self, mechanism: Yoso, x: Prepared) -> str | None:
        if not mechanism.sampled:
            return "expectation=true has no tables"
        if x.call.pairs is not None or x.call.bias is not None:
            return "hash tables cannot hold masks of pairs or biases"
        return None

    def run(self, mechanism: Yoso, x: Prepared) -> Attended:
        codes = mechanism.compute_codes(x, kernel.pack)
        return mechanism.finish(x, *mechanism.sum_through_tables(x, codes, by_kernel=True))
