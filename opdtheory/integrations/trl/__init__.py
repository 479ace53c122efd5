"""Any f-divergence in TRL, over the whole vocabulary or on sampled tokens, and a monitor of a run."""

from opdtheory.integrations.versions import check_version

SUPPORTED = (1, 10), (1, 16)
check_version("trl", *SUPPORTED, extra="trl")

from opdtheory.integrations.trl.monitor import OPDMonitor  # noqa: E402
from opdtheory.integrations.trl.sampled import OPDPlusTrainer  # noqa: E402
from opdtheory.integrations.trl.whole_vocabulary import OPDTrainer  # noqa: E402

__all__ = ["SUPPORTED", "OPDMonitor", "OPDPlusTrainer", "OPDTrainer"]
