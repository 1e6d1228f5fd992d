"""Where data sets are kept, and whether missing ones may be fetched."""

from dataclasses import dataclass

from clip_jax.options import option


@dataclass(frozen=True)
class Access:
    """What opening a source needs to know besides the source's own fields."""

    data_dir: str = option("", "where TFDS keeps its data sets; empty for TFDS's own default", may_change=True)
    offline: bool = option(False, "whether TFDS data sets that are missing are refused, not fetched", may_change=True)
