"""Evaluators: parameters -> numbers, each example counted once on any number of processes."""

from evaluators import loss, retrieval, zeroshot

# Config name -> Evaluator(model, mesh, preprocess, source, loss_fn, *, options).
# .run(params) yields (metric, value, value of chance or None), the same on every process;
# .protocol says in one line what was measured.
EVALUATORS = {
    "retrieval": retrieval.Evaluator,
    "zeroshot": zeroshot.Evaluator,
    "loss": loss.Evaluator,
}
