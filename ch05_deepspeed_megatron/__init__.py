"""Chapter 5: DeepSpeed and Megatron: ZeRO 1/2/3, offload, pipeline, MoE, and tensor parallelism at scale."""
