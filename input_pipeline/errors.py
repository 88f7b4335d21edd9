"""An example that cannot be used, and the kinds by which such examples are counted."""


class BadExample(Exception):
    """An example that cannot be used. Training counts it and goes on, evaluation stops.

    Attributes:
      kind: what counts are kept by, one of KINDS.
      detail: what more is known; for people.
      id, shard: the example and the file it came in, where the one who raises it knows them.
    """

    def __init__(self, kind: str, detail: str = "", *, id: str = "", shard: str = ""):
        assert kind in KINDS, kind
        self.kind, self.detail, self.id, self.shard = kind, detail, id, shard
        super().__init__(f"{kind}: {detail}" if detail else kind)


KINDS = (
    "no image",  # missing, or without a byte
    "unknown image format",
    "image too large",
    "damaged image",
    "unusable image",  # decodes, but to values whose meaning is not known
    "no caption",
    "caption not UTF-8",
    "damaged record",  # checksum, container, or a field of another type
    "unusable caption",  # has a token that the model has no row for
)
