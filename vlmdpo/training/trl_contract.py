"""What vlmdpo relies on in other libraries without their promise: a new release fails here first.

TRL, transformers, accelerate, PEFT and PyTorch promise what they document. vlmdpo needs a little
more: it overrides methods of their trainers, replaces functions for a while, sets attributes and
reads error messages. Each such thing stands below, with why it is needed and what would break
without it. `contract.check(CONTRACT)` compares them with the installed versions.
tests/training/test_trl_contract.py calls it, and fails too when code relies on something that is
not listed, or the list names a module that no longer uses it. PyTorch's own are in
`torch_contract`, accelerate's and PEFT's in `peft_contract`, what only `PairTrainer` needs in
`drop_in_contract`, and all are part of CONTRACT.

How a target is written:

    trl.DPOTrainer._compute_loss(self, model, inputs, return_outputs)    with its parameters
    trl.DPOTrainer._metrics                                              an attribute or class
    trl.trainer.utils.add_fused_lm_head:_fused_forward(fused_lm_head)    a function inside another
    accelerate.utils.launch:FSDP_VERSION                                 a text that a module holds
"""

from __future__ import annotations

from vlmdpo.training.contract import (
    Dependency,
    attributes,
    called,
    classes,
    messages,
    overridden,
    patched,
)
from vlmdpo.training.drop_in_contract import DROP_IN
from vlmdpo.training.peft_contract import ACCELERATE, PEFT
from vlmdpo.training.torch_contract import TORCH

_EVENT = "(self, args, state, control, kwargs)"
_FAMILIES: tuple[str, ...] = (
    "idefics2.modeling_idefics2.Idefics2Model",
    "idefics3.modeling_idefics3.Idefics3Model",
)
_FAMILIES += ("smolvlm.modeling_smolvlm.SmolVLMModel", "gemma3.modeling_gemma3.Gemma3Model")
_FAMILIES += ("llava.modeling_llava.LlavaModel", "llava_next.modeling_llava_next.LlavaNextModel")
_FAMILIES += ("paligemma.modeling_paligemma.PaliGemmaModel",)
_QWEN: tuple[str, ...] = (
    "qwen2_vl.modeling_qwen2_vl.Qwen2VLModel",
    "qwen3_vl.modeling_qwen3_vl.Qwen3VLModel",
)
_QWEN += ("qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLModel",)
_LANGUAGE: tuple[str, ...] = (
    "llama.modeling_llama",
    "mistral.modeling_mistral",
    "gemma.modeling_gemma",
)
_LANGUAGE += ("gemma2.modeling_gemma2", "gemma3.modeling_gemma3", "qwen2.modeling_qwen2")
_LANGUAGE += ("qwen2_vl.modeling_qwen2_vl", "qwen3_vl.modeling_qwen3_vl")
_ATTENTION = "(module, query, key, value, attention_mask)"

_TRL = (
    *overridden(
        "training/trainer",
        "trl.DPOTrainer._compute_loss(self, model, inputs, return_outputs)",
        why="adds cached reference log-probs, and encodes each image once for all forward passes",
        breaks="the loss would use TRL's own reference, and mDPO's terms would not be logged",
    ),
    *overridden(
        "training/run_trainer",
        "trl.DPOTrainer._compute_loss(self, model, inputs, return_outputs)",
        why="loss and reference log-probs are checked before a step uses them",
        breaks="a run would go on with weights that are not finite",
    ),
    *overridden(
        "training/run_trainer",
        "trl.DPOTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)",
        "trl.DPOTrainer.training_step(self, args, kwargs)",
        "transformers.Trainer.get_train_dataloader(self)",
        why="a batch that does not fit into memory is computed in parts; tokens are counted",
        breaks="--auto-batch-size would give wrong gradients or stop at the first full GPU",
    ),
    *overridden(
        "training/run_trainer",
        "trl.DPOTrainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)",
        why="each row of the test split counts alike, where TRL averages over batches",
        breaks="evaluation metrics would weigh the rows of a small last batch more",
    ),
    *overridden(
        "training/run_trainer",
        "trl.DPOTrainer._save_checkpoint(self, model, trial)",
        "transformers.Trainer._get_output_dir(self, trial)",
        why="a checkpoint is written to a hidden folder and renamed once it is whole",
        breaks="a run killed while it saves would leave a checkpoint that --resume cannot read",
    ),
    *overridden(
        "training/run_trainer",
        "trl.DPOTrainer._set_signature_columns_if_needed(self)",
        why="the column `row` stays in the dataset, by which caches are looked up",
        breaks="reference log-probs and image features could not be matched with their rows",
    ),
    *overridden(
        "engine/stock_collator",
        "trl.trainer.dpo_trainer.DataCollatorForVisionPreference.torch_call(self, examples)",
        why="TRL's own collator, given rendered texts, makes the rows that the shared forward is "
        "compared with",
        breaks="--engine stock and the self-check of the engine",
    ),
    *called(
        "training/trainer",
        "trl.DPOTrainer.compute_ref_log_probs(self, model, inputs)",
        why="reference log-probs of one batch, computed as TRL computes them",
        breaks="the reference cache",
    ),
    *called(
        "training/doctor",
        "trl.trainer.utils.add_fused_lm_head:_fused_forward(fused_lm_head, labels)",
        why="the checks before a run score tokens through the very head that the loss uses",
        breaks="--doctor, the self-check of the engine, and the check of the saved adapter",
    ),
    *patched(
        "training/trainer",
        "trl.trainer.dpo_trainer.use_adapter(model, adapter_name)",
        why="reference forward passes switch the adapter without touching `requires_grad`",
        breaks="under FSDP2 the adapter would lose a part of its gradients",
    ),
    *patched(
        "training/simulate",
        "trl.trainer.utils._use_triton(device)",
        why="a memory simulation on a CPU takes the path that the head takes on a GPU",
        breaks="memory estimates would count logits of every token",
    ),
    *patched(
        "training/simulate",
        "trl.kernels.chunked_logprob._forward_tile(tile, tile_stride, targets, running_max, "
        "sum_exp, x_sum_exp, sq_sum_exp, z_sum, max_before_target, target_logit, vocab_start, "
        "n_cols, logit_scale, softcap, inv_t, HAS_SOFTCAP, HAS_ENTROPY, HAS_LOG_SUM_SQ_PROBS, "
        "HAS_MEAN_LOGITS, HAS_IS_TOP1, BLOCK_SIZE)",
        "trl.kernels.chunked_logprob._backward_tile(tile, tile_stride, targets, log_z, entropy, "
        "grad_logprobs, grad_entropy, vocab_start, n_cols, logit_scale, softcap, inv_t, "
        "HAS_SOFTCAP, HAS_LOGPROB_GRAD, HAS_ENTROPY_GRAD, BLOCK_SIZE)",
        "trl.kernels.chunked_logprob._addmm_fp32(acc, a, b)",
        why="the CPU's stand-ins for the head's kernels take copies that a GPU does not",
        breaks="memory estimates of many answer tokens would be far too high",
    ),
    *attributes(
        "training/activation_checkpointing training/auto_batch",
        "trl.DPOTrainer._metrics",
        "trl.DPOTrainer._total_train_tokens",
        why="metrics of a step that is measured or broken off are taken back",
        breaks="metrics would count such steps twice",
    ),
    *attributes(
        "training/trainer training/run_trainer",
        "trl.DPOTrainer.precompute_ref_logps",
        "trl.DPOTrainer.ref_model",
        "trl.DPOTrainer.beta",
        why="set so that TRL reads reference log-probs from the batch and keeps no second model",
        breaks="the reference cache would save neither time nor memory",
    ),
)

_TRANSFORMERS_TRAINER = (
    *overridden(
        "training/run_trainer",
        "transformers.Trainer.create_accelerator_and_postprocess(self)",
        why="FSDP is switched on where accelerate quietly runs DDP, on CPUs",
        breaks="--strategy fsdp2 on CPUs, which the tests of sharding use",
    ),
    *overridden(
        "training/trainer",
        "transformers.Trainer._prepare_inputs(self, inputs)",
        why="pixels take the model's data type, as they do in asking",
        breaks="families whose vision tower does not cast float32 pixels, in bfloat16",
    ),
    *overridden(
        "training/trainer",
        "transformers.Trainer._get_train_sampler(self, train_dataset)",
        why="rows of one image, or of similar length, are grouped in one order for all processes "
        "and after a resume",
        breaks="a resumed run would visit rows twice or never",
    ),
    *called(
        "training/keep_best",
        "transformers.Trainer._load_from_checkpoint(self, resume_from_checkpoint, model)",
        why="the best weights are read from their checkpoint as those of a resumed run are",
        breaks="--keep-best",
    ),
    *messages(
        "training/arguments",
        "transformers.trainer_optimizer:lease install",
        why="of some optimizers a missing package is no ImportError, but known by these words",
        breaks="the exit code for it, 6",
    ),
    *overridden(
        "training/run_trainer",
        "transformers.Trainer._run_epoch(self, model, epoch, train_dataloader, steps_in_epoch, "
        "num_update_steps_per_epoch, trial, ignore_keys_for_eval, start_time, "
        "resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)",
        why="a run that is resumed after its last step takes no further one",
        breaks="--resume of a finished run would train one step too many",
    ),
    *overridden(
        "training/monitor training/samples training/make_trainer training/preflight",
        f"transformers.TrainerCallback.on_train_begin{_EVENT}",
        f"transformers.TrainerCallback.on_train_end{_EVENT}",
        f"transformers.TrainerCallback.on_epoch_end{_EVENT}",
        f"transformers.TrainerCallback.on_step_end{_EVENT}",
        f"transformers.TrainerCallback.on_substep_end{_EVENT}",
        f"transformers.TrainerCallback.on_evaluate{_EVENT}",
        f"transformers.TrainerCallback.on_save{_EVENT}",
        f"transformers.TrainerCallback.on_log{_EVENT}",
        why="progress, metrics, samples and clean stops hang on these events",
        breaks="the event's part of a run would silently not happen",
    ),
    *called(
        "training/activation_checkpointing training/doctor training/simulate training/trainer",
        "transformers.Trainer._prepare_inputs(self, inputs)",
        why="a batch is moved to the device as the trainer moves it",
        breaks="checks and measurements outside the training loop",
    ),
    *called(
        "training/length_grouping",
        "transformers.trainer_pt_utils.get_length_grouped_indices(lengths, batch_size, generator)",
        why="transformers' order of rows of similar length, from a generator of our own",
        breaks="--group-by-length",
    ),
    *attributes(
        "training/run_trainer",
        "transformers.Trainer._signature_columns",
        "transformers.Trainer.is_fsdp_enabled",
        why="the column `row` is added to those kept; FSDP is switched on on CPUs",
        breaks="caches by row; --strategy fsdp2 on CPUs",
    ),
)

_TRANSFORMERS_MODELS = (
    *patched(
        "engine/forward engine/decode",
        *(f"transformers.models.{model}.get_image_features" for model in (*_FAMILIES, *_QWEN)),
        why="replaced on the model: image features are computed once and kept",
        breaks="every image would be encoded again for each answer",
    ),
    *patched(
        "engine/forward",
        "transformers.PreTrainedModel.forward",
        why="replaced on backbone and frozen vision towers, which then take packed pairs",
        breaks="the shared engine",
    ),
    *patched(
        "engine/decode",
        "transformers.BaseImageProcessor.preprocess",
        why="replaced while one image is asked about, so that it is processed once",
        breaks="each question about an image would process its pixels again",
    ),
    *patched(
        "training/sharding",
        "transformers.PreTrainedModel.get_input_embeddings(self)",
        "transformers.PreTrainedModel.get_output_embeddings(self)",
        why="hidden while FSDP wraps the model: TRL reads the head's weights without calling it",
        breaks="gradients of the head would stay unsynchronized between processes",
    ),
    *patched(
        "memory/fake_tensors",
        "transformers.utils.import_utils.is_fake_tensor(x)",
        why="a simulated step takes the path of a real one, not that of a traced model",
        breaks="memory estimates would include attention masks that a run leaves out",
    ),
    *overridden(
        "models/processor_parts",
        "transformers.ProcessorMixin.get_attributes()",
        "transformers.ProcessorMixin.from_args_and_dict(args, processor_dict, kwargs)",
        why="a processor without its video part, which needs torchvision; parts go by name",
        breaks="processors of Qwen2-VL and SmolVLM on machines without torchvision",
    ),
    *overridden(
        "engine/side_by_side engine/padded_rows engine/streaming",
        "transformers.generation.streamers.BaseStreamer.put(self, value)",
        "transformers.generation.streamers.BaseStreamer.end(self)",
        "transformers.StoppingCriteria.__call__(self, input_ids, scores, kwargs)",
        why="`generate` passes on each token, and stops early",
        breaks="vlmdpo compare, infer on a terminal, and early stops of eval-amber",
    ),
    *overridden(
        "engine/next_token",
        "transformers.LogitsProcessor.__call__(self, input_ids, scores)",
        why="`generate` takes the tokens that were drawn for each row by itself",
        breaks="samples of models whose prompts cannot share their prefix",
    ),
    *called(
        "engine/packed_attention",
        *(f"transformers.models.{name}.eager_attention_forward{_ATTENTION}" for name in _LANGUAGE),
        f"transformers.integrations.sdpa_attention.sdpa_attention_forward{_ATTENTION}",
        "transformers.masking_utils.sdpa_mask(mask_function, device)",
        "transformers.masking_utils.eager_mask(mask_function, device, dtype)",
        why="attention of packed rows is the model's own, one pair after the other",
        breaks="the shared engine",
    ),
    *called(
        "models/families",
        *(
            f"transformers.models.{model}.compute_3d_position_ids(self, input_ids, inputs_embeds, "
            "image_grid_thw, video_grid_thw, past_key_values, attention_mask, mm_token_type_ids)"
            for model in _QWEN
        ),
        why="positions of packed rows are those that the model gives stock rows (M-RoPE)",
        breaks="the shared engine for Qwen's models",
    ),
    *called(
        "models/families",
        "transformers.Idefics3Processor._get_num_multimodal_tokens(self, image_sizes)",
        "transformers.Qwen2VLProcessor._get_num_multimodal_tokens(self, image_sizes)",
        why="tokens of an image are counted from its size, without its pixels",
        breaks="vlmdpo prepare would process every image to count its tokens",
    ),
    *attributes(
        "models/image_limits",
        "transformers.processing_utils.ProcessingKwargs._defaults",
        why="settings that a processor gives its image processor; newer ones hold `images_kwargs`",
        breaks="images would be bounded at one tile for InternVL and Aya Vision",
    ),
    *called(
        "models/image_limits",
        "transformers.Qwen2VLImageProcessorPil.get_number_of_image_patches(self, height, width, "
        "images_kwargs)",
        why="which area an image may have, however the setting counts it",
        breaks="images would be bounded at another size",
    ),
    *called(
        "training/simulate memory/architecture",
        "transformers.initialization.no_init_weights()",
        why="models of real size are built without computing initial values",
        breaks="vlmdpo estimate-memory would take minutes and memory",
    ),
    *called(
        "training/activation_checkpointing",
        "transformers.PreTrainedModel.activation_checkpointing_enable(self)",
        why="recomputation is switched on as `Trainer.train` does it",
        breaks="--checkpointing auto and memory estimates",
        since="5.23",
    ),
    *called(
        "engine/forward",
        "transformers.PreTrainedModel.enable_input_require_grads:make_inputs_require_grads",
        why="its hooks are found by their qualified name and removed",
        breaks="a backward pass would run through every frozen vision layer",
    ),
    *attributes(
        "engine/packed_attention models/attention training/engine_choice",
        "transformers.PreTrainedConfig._attn_implementation",
        why="each part of a model is switched to the attention that it can use, and language "
        "models to one that also takes packed rows",
        breaks="the shared engine, and --attn-implementation",
    ),
    *attributes(
        "training/trainer training/sharding",
        "transformers.modeling_layers.GradientCheckpointingLayer.gradient_checkpointing",
        why="switched off for the layers that keep their activations",
        breaks="--checkpointing with fewer than all layers",
    ),
    *attributes(
        "models/families engine/feature_cache",
        "transformers.modeling_outputs.BaseModelOutputWithPooling.pooler_output",
        "transformers.models.qwen3_vl.modeling_qwen3_vl.BaseModelOutputWithDeepstackFeatures"
        ".deepstack_features",
        why="where `get_image_features` puts what is kept and repeated",
        breaks="image features would be neither shared nor cached",
    ),
    *classes(
        "models/load",
        "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
        why="tells vision-language models from others by their configuration",
        breaks="a clear message for --model with a text model",
    ),
    *messages(
        "models/load",
        "transformers.dynamic_module_utils:trust_remote_code",
        why="a model that needs code of its own is recognized by this word",
        breaks="the advice to add --trust-remote-code",
    ),
)

CONTRACT: tuple[Dependency, ...] = (
    *(*_TRL, *_TRANSFORMERS_TRAINER, *_TRANSFORMERS_MODELS),
    *(*DROP_IN, *ACCELERATE, *PEFT, *TORCH),
)
