"""Geometry of the network. Field names are those of the released JSON files."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """Qwen2.5 decoder with two experts a layer (`llm_config.json`)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def __post_init__(self):
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or heads % kv_heads or self.head_dim % 2:
            raise ValueError(
                f"llm: hidden_size {self.hidden_size} must be num_attention_heads {heads} times an even "
                f"head size, and the heads a multiple of num_key_value_heads {kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """SigLIP2 encoder (`vit_config.json`). `num_hidden_layers` counts all layers of the release."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"vit: hidden_size {self.hidden_size} is not a multiple of "
                             f"num_attention_heads {self.num_attention_heads}")


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """FLUX autoencoder; the defaults are the released one's (its config file does not name them)."""

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self):
        if any(self.ch * mult % 32 for mult in self.ch_mult):
            raise ValueError(f"vae: ch {self.ch} times each of ch_mult {self.ch_mult} must be a multiple "
                             "of 32, the number of norm groups")

    @property
    def downsample(self) -> int:
        """Pixels a latent position covers along a side."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole (`config.json` beside the two above)."""

    llm: LLMConfig
    vit: ViTConfig
    vae: VAEConfig
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    vit_select_layer: int = -2
    timestep_shift: float = 1.0   # BAGEL's own field; training takes its shift from its config

    def __post_init__(self):
        if self.llm.hidden_size % 4:
            raise ValueError(f"llm: hidden_size {self.llm.hidden_size} must be a multiple of 4: "
                             "the fixed position tables hold sine and cosine of row and column")
        if not 1 <= self.num_vit_layers <= self.vit.num_hidden_layers:
            raise ValueError(f"vit_select_layer {self.vit_select_layer} selects no layer of "
                             f"{self.vit.num_hidden_layers}")

    @property
    def num_vit_layers(self) -> int:
        """Layers in use: index -2 of the hidden states drops the last one."""
        from_end = self.vit.num_hidden_layers + 1 if self.vit_select_layer < 0 else 0
        return self.vit_select_layer + from_end

    @property
    def latent_channels(self) -> int:
        """Values a latent token."""
        return self.latent_patch_size**2 * self.vae.z_channels

    @property
    def pixels_per_token(self) -> int:
        """Pixels a latent token covers along a side."""
        return self.latent_patch_size * self.vae.downsample
