"""Any f-divergence in TRL: `OPDTrainer` over the whole vocabulary, `OPDPlusTrainer` on the sampled tokens."""

from opdtheory.integrations.versions import check_version

SUPPORTED = (1, 10), (1, 16)
check_version("trl", *SUPPORTED, extra="trl")

from opdtheory.integrations.trl.sampled import OPDPlusTrainer  # noqa: E402
from opdtheory.integrations.trl.whole_vocabulary import OPDTrainer  # noqa: E402

__all__ = ["SUPPORTED", "OPDPlusTrainer", "OPDTrainer"]
