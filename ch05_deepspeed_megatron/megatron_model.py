"""A Llama in Megatron-Core's terms: GPTModel with RMSNorm, SwiGLU, rotary positions and grouped queries, no biases.

with layout.groups(ctx):
    model = build(config, layout, ctx)           # this rank's stage and shards: memory, without values
    megatron_convert.load(model, folder, ctx)    # or initialize(model, seed, ctx)
    ddp, optimizer = wrap(model, ctx, lr=2e-3)   # gradients in buckets, and an optimizer that knows the layout
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ch05_deepspeed_megatron import megatron_shim
from ch05_deepspeed_megatron.megatron_layout import Layout
from common.dist import Context
from common.script import UserError

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Norm(nn.RMSNorm):
    """RMSNorm for the layer spec. Under sequence parallelism each rank norms its part of the sequence, so that each has
    a part of the weight's gradient: the mark tells finalize_model_grads to sum them. Megatron's own wrapper around
    torch's norm refuses sequence parallelism for want of it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def block_spec(layers: int) -> Any:
    """This stage's layers: Megatron's local ones, plain torch operations without Transformer Engine, with our norm."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm)


def transformer_config(config: Any, layout: Layout, ctx: Context, *, dtype: torch.dtype, dropout: float = 0.0) -> Any:
    """Megatron's TransformerConfig of a Llama. What is not said here is Megatron's default."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=head_dim(config),
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        gated_linear_unit=True,  # SwiGLU: gate and up are one matrix
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=dropout,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        attention_softmax_in_fp32=dtype != torch.float32,
        # The values come from megatron_convert. Not perform_initialization=False: that also leaves out the mark which
        # tells the gradient norm that a weight is one of several shards, and clipping would go by those of rank 0.
        init_method=leave,
        output_layer_init_method=leave,
        # The loss function returns a sum and a count. finalize_model_grads divides once, by the tokens of all
        # micro-batches and all ranks: rows are ragged, and a mean of means would be another loss.
        calculate_per_token_loss=True,
        # Fused kernels are Apex's and Transformer Engine's, for GPUs; these run everywhere.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        batch_p2p_comm=ctx.device.type == "cuda",
    )


def leave(weight: torch.Tensor) -> torch.Tensor:
    """As an initialization: none."""
    return weight


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope(config: Any) -> dict[str, Any]:
    """GPTModel's arguments for the rotary positions.

    Raises:
        UserError: they are scaled in a way that Megatron-Core has not.
    """
    said = dict(config.rope_parameters)
    kind = said.get("rope_type", "default")
    found = {"position_embedding_type": "rope", "rotary_base": said["rope_theta"]}
    if kind == "llama3" and all(said.get(name) == value for name, value in LLAMA3.items()):
        return found | {"rope_scaling": True, "rope_scaling_factor": said["factor"]}
    if kind != "default":
        raise UserError(f"rotary positions of the kind {said} are not Megatron-Core's; take a model with others")
    return found


def build(
    config: Any, layout: Layout, ctx: Context, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> nn.Module:
    """This rank's part of the model, inside layout.groups(ctx). Its parameters are allocated and not set.

    Returns:
        A GPTModel; model.hf_config is `config`.
    """
    megatron_shim.install(ctx.device)
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    model = GPTModel(
        transformer_config(config, layout, ctx, dtype=dtype, dropout=dropout),
        block_spec(config.num_hidden_layers // layout.pp),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        **rope(config),
    )
    model.hf_config, model.layout = config, layout
    mark_shards(model)
    return model.to(ctx.device)


def mark_shards(model: nn.Module) -> None:
    """Say of each weight that is cut over the tensor-parallel ranks that it is. Megatron does so where it draws initial
    values, which here come from elsewhere; without the mark the norm of the gradients counts the first rank's alone."""
    from megatron.core import tensor_parallel

    cut = {
        tensor_parallel.VocabParallelEmbedding: 0,
        tensor_parallel.ColumnParallelLinear: 0,
        tensor_parallel.RowParallelLinear: 1,
    }
    for module in model.modules():
        if type(module) in cut and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, cut[type(module)], 1)


def wrap(
    model: nn.Module,
    ctx: Context,
    *,
    lr: float,
    clip: float = 1.0,
    distributed_optimizer: bool = True,
    overlap: bool = False,
    bucket_elements: int | None = None,
) -> tuple[nn.Module, Any]:
    """Megatron's DistributedDataParallel around the model, and its optimizer: AdamW as in chapter 1.

    Args:
        distributed_optimizer: each data-parallel rank keeps the optimizer's state of its share of the weights (ZeRO-1).
        overlap: reduce the gradients while backward still runs.
        bucket_elements: that many gradients travel in a message (default: Megatron's, at least 40 million).
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    if model.config.bf16:
        from megatron.core.transformer.module import Float16Module

        model = Float16Module(model.config, model)
    config = model.config
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap,
            use_distributed_optimizer=distributed_optimizer,
            bucket_size=bucket_elements,
        ),
        model,
    )
    settings = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=0.0,
        weight_decay=0.1,  # of matrices; Megatron leaves out whatever has one dimension
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=clip,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=distributed_optimizer,
    )
    made = get_megatron_optimizer(settings, [ddp], use_gloo_process_groups=False)
    for part in made.chained_optimizers:
        for group in part.optimizer.param_groups:  # what else its scheduler would do, step by step: norms do not decay
            group["weight_decay"] *= group["wd_mult"]
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = made.scale_loss
    config.no_sync_func = ddp.no_sync
    return ddp, made


def inner(model: nn.Module) -> nn.Module:
    """The GPTModel, without what is around it."""
    while hasattr(model, "module"):
        model = model.module
    return model


def held_bytes(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """What this rank holds of the parameters, and of the optimizer's state with its float32 copies of weights."""
    weights = {p.untyped_storage().data_ptr() for p in inner(model).parameters()}
    states = [
        tensor
        for part in optimizer.chained_optimizers
        for parameter, state in part.optimizer.state.items()
        for tensor in (*state.values(), *([] if parameter.untyped_storage().data_ptr() in weights else [parameter]))
        if torch.is_tensor(tensor) and tensor.dim()
    ]
    return {
        "parameters": sum(p.numel() * p.element_size() for p in inner(model).parameters()),
        "optimizer": sum(t.numel() * t.element_size() for t in states),
    }
