"""SiT: the transformer that predicts the clean latent from a noisy one.

It is the SiT / DiT of Ma et al. 2024 and Peebles & Xie 2023 with one thing taken away: there is no
timestep. The class alone drives adaLN-Zero; how noisy the input is, the network sees for itself
(paper, section 4.1). This file knows nothing of spheres, noise or images: it maps (B, C, H, W) and
a label to (B, C, H, W). In comments: B batch, T tokens, D hidden size, h heads, p patch size.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def modulate(x, shift, scale):
    """x (B, T, D), shift and scale (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # each (B, h, T, D / h), h heads
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))  # (B, h, T, D / h) -> (B, T, D)


class Mlp(nn.Module):
    def __init__(self, hidden_size, mlp_ratio):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the class (adaLN-Zero)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        """x (B, T, D) tokens, c (B, D) the class -> (B, T, D)"""
        (shift_msa, scale_msa, gate_msa,
         shift_mlp, scale_mlp, gate_mlp) = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """The denoiser G(v, y). `num_classes` itself is the null class of classifier-free guidance.

    input_size: side H = W of the latent; patch_size divides it; 4 and num_heads divide
    hidden_size; out_channels: in_channels, if not given.
    """

    def __init__(self, input_size=16, in_channels=768, patch_size=1, hidden_size=768, depth=12,
                 num_heads=12, mlp_ratio=4.0, num_classes=1000, class_dropout_prob=0.1,
                 out_channels=None):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"patch_size {patch_size} must divide input_size {input_size}; "
                             f"num_heads {num_heads} and 4 must divide hidden_size {hidden_size}")
        self.input_size, self.in_channels, self.patch_size = input_size, in_channels, patch_size
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.out_channels = out_channels or in_channels
        self.checkpoint_activations = False           # True: compute blocks twice, to save memory

        self.x_embedder = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.y_embedder = nn.Embedding(num_classes + 1, hidden_size)
        # Fixed, but a Parameter: in the state dict, and counted (XL 675.2M, the paper: 674M).
        positions = sincos_2d(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio)
                                    for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.weight.data.flatten(1))   # a Linear on each patch
        nn.init.zeros_(self.x_embedder.bias)
        for weight in self.embeddings():
            nn.init.normal_(weight, std=0.02)
        for layer in [*self.blocks, self.final_layer]:        # adaLN-Zero: blocks start as identity
            nn.init.zeros_(layer.adaLN_modulation[-1].weight)
        # DiT starts the last layer at zero. Here the loss asks for a direction (1 - cos), and a
        # zero output has none: its gradient has a norm of 1e9. A small random start costs nothing.
        nn.init.normal_(self.final_layer.linear.weight, std=0.02)

    # What drives the blocks; baselines.TimedSiT adds times here.
    def embeddings(self):
        return [self.y_embedder.weight]

    def condition(self, y):
        """What drives adaLN: y (B,) -> (B, D)."""
        return self.y_embedder(y)

    def forward(self, x, y, *more, drop=None, generator=None):
        """x (B, C, H, W), y (B,) int64 -> (B, out_channels, H, W). more: what `condition` takes.

        drop (B,) bool: labels that the null class replaces. Without it, in training mode, each with
        probability class_dropout_prob, drawn from generator.
        """
        B, C, H, W = x.shape
        if drop is None and self.training:
            device = generator.device if generator else y.device
            drop = torch.rand(B, generator=generator, device=device) < self.class_dropout_prob
            drop = drop.to(y.device)
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)

        x = self.x_embedder(x).flatten(2).transpose(1, 2)            # (B, D, H/p, W/p) -> (B, T, D)
        x = x + self.pos_embed
        c = self.condition(y, *more)                                     # (B, D)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
        x = self.final_layer(x, c)                                       # (B, T, p * p * C)

        p = self.patch_size
        x = x.view(B, H // p, W // p, p, p, -1).permute(0, 5, 1, 3, 2, 4)   # (B, C, H/p, p, W/p, p)
        return x.reshape(B, self.out_channels, H, W)


def sincos_2d(dim, grid_size):
    """Fixed positions (1, grid_size ** 2, dim), row-major: [sin col, cos col, sin row, cos row]."""
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))                # (D / 4,)
    angle = np.arange(grid_size)[:, None] * omega                         # (G, D / 4), float64
    one_axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)     # (G, D / 2)
    row, col = np.divmod(np.arange(grid_size ** 2), grid_size)
    table = np.concatenate([one_axis[col], one_axis[row]], axis=1)        # (G * G, D)
    return torch.from_numpy(table).float().unsqueeze(0)


def preset(**sizes):                                          # kind: SiT, or a class like it
    return lambda kind=SiT, **kwargs: kind(**{**sizes, **kwargs})


SiT_models = {
    "SiT-T/1": preset(patch_size=1, hidden_size=128, depth=4, num_heads=4),      # ours, the toy's
    "SiT-XS/1": preset(patch_size=1, hidden_size=192, depth=6, num_heads=3),     # ours, for lite0
    "SiT-S/1": preset(patch_size=1, hidden_size=384, depth=12, num_heads=6),
    "SiT-B/1": preset(patch_size=1, hidden_size=768, depth=12, num_heads=12),
    "SiT-L/1": preset(patch_size=1, hidden_size=1024, depth=24, num_heads=16),
    "SiT-XL/1": preset(patch_size=1, hidden_size=1152, depth=28, num_heads=16),
}
