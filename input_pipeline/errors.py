"""The exception for an example that cannot be used, and the kinds by which they are counted."""


class BadExample(Exception):
    """An example that cannot be used. Training counts it and goes on, evaluation stops.

    Attributes:
      kind: one of KINDS; examples are counted by it.
      detail: what is wrong with this one, for people.
      id, shard: the example and the file it is in, where the code that raises knows them.
    """

    def __init__(self, kind: str, detail: str = "", *, id: str = "", shard: str = ""):
        assert kind in KINDS, kind
        self.kind, self.detail, self.id, self.shard = kind, detail, id, shard
        super().__init__(f"{kind}: {detail}" if detail else kind)


# A batch stores a kind as 1 + its place in this tuple.
KINDS = (
    "no image",  # missing or empty
    "unknown image format",
    "image too large",
    "damaged image",
    "unusable image",  # decodes, but its values have no known meaning
    "no caption",
    "caption not UTF-8",
    "damaged record",  # checksum, container, or a field of the wrong type
    "unusable caption",  # has a token beyond the model's embedding table
)
