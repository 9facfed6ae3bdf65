"""The sizes of the small checkpoint, in the words of the published configuration files.

Owns both config.json files and generation_config.json. Everything else derives from them.
"""

import pca_vae
import words

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 192, 4, 6, 3, 32
EXPERTS, TOP_K, EXPERT_WIDTH = 4, 2, 128
INNER = 128
RANK = 16


def backbone(vocab_size: int, special: dict[str, int]) -> dict:
    """config.json of the backbone."""
    return dict(
        architectures=["HunyuanImage3ForCausalMM"],
        model_type="hunyuan_image_3_moe",
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=EXPERT_WIDTH,
        moe_intermediate_size=[EXPERT_WIDTH] * LAYERS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        attention_head_dim=HEAD_DIM,
        hidden_act="silu",
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_theta=10000.0,
        use_qk_norm=True,
        attention_bias=False,
        mlp_bias=False,
        norm_type="rms",
        num_experts=EXPERTS,
        use_mixed_mlp_moe=True,
        num_shared_expert=[1] * LAYERS,
        moe_topk=[TOP_K] * LAYERS,
        moe_layer_num_skipped=0,
        norm_topk_prob=True,
        vae_downsample_factor=[16, 16],
        img_proj_type="unet",
        patch_size=1,
        patch_embed_hidden_dim=INNER,
        image_base_size=words.BASE_SIZE,
        image_extra_sizes=[],
        rope_type="2d",
        cond_token_attn_type="joint_full",
        cond_image_type="vae_vit",
        vae_dtype="float32",
        vae_autocast_dtype="float32",
        vae=pca_vae.CONFIG,
        vit=dict(
            hidden_size=96,
            intermediate_size=192,
            num_attention_heads=3,
            num_hidden_layers=2,
            num_patches=16,
            patch_size=16,
            num_channels=3,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            attention_dropout=0.0,
            vision_use_head=False,
        ),
        vit_processor=dict(
            max_num_patches=16,
            patch_size=16,
            image_processor_type="Siglip2ImageProcessorFast",
            do_resize=True,
            do_rescale=True,
            do_normalize=True,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            resample=2,
        ),
        vit_aligner=dict(projector_type="mlp_gelu", depth=2, input_dim=96, n_embed=HIDDEN),
        cfg_distilled=True,
        use_meanflow=False,
        torch_dtype="float32",
        bos_token_id=special["<|startoftext|>"],
        eos_token_id=special["<|endoftext|>"],
        pad_token_id=special["<pad>"],
        pad_id=special["<pad>"],
        im_start_id=special["<boi>"],
        im_end_id=special["<eoi>"],
        image_token_id=special["<img>"],
    )


def generation(special: dict[str, int]) -> dict:
    """generation_config.json: few steps, because a deterministic edit needs no more."""
    return dict(
        bot_task="think_recaption",
        do_sample=True,
        eos_token_id=[special["<|endoftext|>"]],
        pad_token_id=special["<pad>"],
        bos_token_id=special["<|startoftext|>"],
        max_length=8192,
        max_new_tokens=64,
        sequence_template="instruct",
        temperature=0.1,
        top_k=1024,
        top_p=0.95,
        use_system_prompt="en_unified",
        drop_think=False,
        diff_infer_steps=4,
        diff_guidance_scale=2.5,
        flow_shift=1.0,
    )


def generator() -> dict:
    """config.json of the parameter generator."""
    qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    return dict(
        architectures=["ParameterGenerator"],
        model_type="parameter_generator",
        input_dim=HIDDEN,
        num_base_model_layers=LAYERS,
        d_model=224,
        head_dim=32,
        num_pg_layers=2,
        token_dim=768,
        output_dim=768,
        dim_accumulation=4,
        rank=RANK,
        alpha=RANK,
        prefix="model.layers.",
        torch_dtype="float32",
        pg_mapping={
            "self_attn.qkv_proj": dict(lora_A_dim=HIDDEN, lora_B_dim=qkv),
            "self_attn.o_proj": dict(lora_A_dim=HEADS * HEAD_DIM, lora_B_dim=HIDDEN),
            "mlp.shared_mlp.gate_and_up_proj": dict(lora_A_dim=HIDDEN, lora_B_dim=2 * EXPERT_WIDTH),
            "mlp.shared_mlp.down_proj": dict(lora_A_dim=EXPERT_WIDTH, lora_B_dim=HIDDEN),
            "mlp.experts": dict(
                type="grouped",
                num_experts=EXPERTS,
                sub_weights={
                    "w1": dict(lora_A_dim=HIDDEN, lora_B_dim=EXPERT_WIDTH),
                    "w2": dict(lora_A_dim=EXPERT_WIDTH, lora_B_dim=HIDDEN),
                    "w3": dict(lora_A_dim=HIDDEN, lora_B_dim=EXPERT_WIDTH),
                },
            ),
        },
    )
