"""Where examples come from; all names are in registry.py.

A source is a class whose keyword-only settings are config keys, with
* `__len__`, and `__getitem__(i)` -> example, from any thread and the same for ever:
    image      encoded bytes, or uint8 [h, w, 3]
    texts      list of captions; training draws one, evaluation sees all
    id         its name, for people
    weights, languages   (optional) of each text: how often it is drawn; its language tag
    label      (optional) class, an index into `class_names` where the source has them
    shard      (optional) the file it came in
  An example that cannot be read raises BadExample; mistakes of the settings, UserError.
* `class_names`: list, or None;
* `blocks`, `window` (optional): see order.BlockEpochs;
* `by_language()` (optional): language tag -> indices of the examples that have a text in it;
* `damage` (optional): (kind, file) -> samples that were left out while opening.
"""
