"""
Start a text model with an induction circuit, so that it can copy from its prompt before it has learned anything.

Two cores would need hours to find one, and until then the model answers about another place than it was asked about. A
head of the first layer carries every token on to the next position; a head of the second looks for the place where the
token before is the present one, and proposes the token found there (Olsson et al., arXiv 2209.11895). Training shapes
it into whatever the answers need.
"""

import torch
from transformers import LlavaForConditionalGeneration


# Parts of the residual stream: one dimension that is the same for all tokens, a code of the token itself, a code of
# the token before, and what the second head proposes.
_CONSTANT, _IDENTITY, _PREVIOUS, _PROPOSAL = 0, slice(1, 96), slice(96, 128), slice(160, 192)


@torch.no_grad()
def plant_induction(model: LlavaForConditionalGeneration) -> None:
    """Write the circuit into the first two layers, the embeddings and the head of an untrained target."""
    text = model.model.language_model
    for layer in text.layers[:2]:
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
    embeddings = text.embed_tokens.weight.normal_(std=1.0)
    embeddings[:, _IDENTITY.stop :] = 0
    embeddings[:, _CONSTANT] = 3.0
    model.model.multi_modal_projector.linear_2.bias[_CONSTANT] = 3.0
    width = _PREVIOUS.stop - _PREVIOUS.start
    key_code, value_code = (torch.linalg.qr(torch.randn(95, width)).Q.T for _ in range(2))  # (width, 95)
    _plant_previous_token_head(text.layers[0].self_attn, text.rotary_emb.inv_freq, key_code)
    _plant_matching_head(text.layers[1].self_attn, key_code, value_code)
    model.lm_head.weight[:, _PROPOSAL] = 0.25 * embeddings[:, _IDENTITY] @ value_code.T


def _plant_previous_token_head(attention: torch.nn.Module, frequencies: torch.Tensor, code: torch.Tensor) -> None:
    """Let the first head look one position back, by the fastest rotary frequencies, and carry the token's code."""
    half, num_used = attention.head_dim // 2, 4
    attention.q_proj.weight[:num_used, _CONSTANT] = 1.4
    attention.k_proj.weight[:num_used, _CONSTANT] = 1.4 * frequencies[:num_used].cos()
    attention.k_proj.weight[half : half + num_used, _CONSTANT] = 1.4 * frequencies[:num_used].sin()
    attention.v_proj.weight[: len(code), _IDENTITY] = code
    attention.o_proj.weight[_PREVIOUS, : len(code)] = torch.eye(len(code))


def _plant_matching_head(attention: torch.nn.Module, key_code: torch.Tensor, value_code: torch.Tensor) -> None:
    """Let the first head look where the token before is the present one, by the slow frequencies, and propose."""
    half = attention.head_dim // 2
    slow = torch.cat([torch.arange(half // 2, half), torch.arange(half + half // 2, 2 * half)])
    rows = torch.arange(len(slow))
    attention.q_proj.weight[slow, _IDENTITY] = 2.2 * key_code[rows]
    attention.k_proj.weight[slow, _PREVIOUS.start + rows] = 2.2
    attention.v_proj.weight[: len(value_code), _IDENTITY] = value_code
    attention.o_proj.weight[_PROPOSAL, : len(value_code)] = torch.eye(len(value_code))
