"""The DPOTrainer subclass: TRL's trainer, loss and metrics, fed by the pair engine.

Nothing of the loss is written here. The batch is shaped so that TRL's code reads it as its own.
"""

from __future__ import annotations

from typing import Any

from trl import DPOConfig, DPOTrainer

from vlmdpo.dpo.batch import PairCollator, StockCollator
from vlmdpo.dpo.forward import SharedForward
from vlmdpo.dpo.reference import ReferenceCache

ENGINES = ("shared", "rows", "stock")


class PairTrainer(DPOTrainer):
    """TRL's `DPOTrainer` on prepared pairs, with one of three engines.

    Args:
        engine: "shared" runs image and prompt once for both answers; "rows" gives each answer its own row but
            encodes each image once, for models that cannot share; "stock" is TRL as it is.
        references: reference log-probs by row; needs the column `row` in the dataset. None: TRL's own way, every
            batch anew.
        others: what `DPOTrainer` takes.
    """

    def __init__(
        self,
        *,
        engine: str,
        processing_class: Any,
        args: DPOConfig,
        references: ReferenceCache | None = None,
        **others: Any,
    ) -> None:
        self.engine = engine
        if engine == "stock":
            collator: Any = StockCollator(processing_class, max_length=args.max_length)
        else:
            collator = PairCollator(processing_class, max_length=args.max_length, share=engine == "shared")
        super().__init__(processing_class=processing_class, args=args, data_collator=collator, **others)
        self.references = references
        self._shared: list[SharedForward] = []
        if engine != "stock":
            self.use_engine()

    def use_engine(self) -> None:
        """Let policy and, where there is one, reference model read this engine's batches."""
        models = [self.model] + ([self.ref_model] if self.ref_model is not None else [])
        self._shared = [SharedForward(model, share=self.engine == "shared") for model in models]

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += ["row"]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        rows = inputs.pop("row", None)
        if not self._shared:
            return self._with_references(model, inputs, rows, return_outputs)
        with self._shared[0].one_batch():
            return self._with_references(model, inputs, rows, return_outputs)

    def _with_references(self, model: Any, inputs: dict[str, Any], rows: Any, return_outputs: bool) -> Any:
        """TRL's loss, with the rows' reference log-probs from the cache; those not in it yet are computed first."""
        if self.references is not None:
            known = self.references.get(rows)
            if known is None:
                known = self.compute_ref_log_probs(self.ref_model or model, inputs)
                self.references.put(rows, *known)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = (logps.to(rows.device) for logps in known)
            self.precompute_ref_logps = True
        return super()._compute_loss(model, inputs, return_outputs)
