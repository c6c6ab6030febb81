"""The same mixture of experts by hand: one process, all experts, a loop over tokens. What parity is measured against.

Nothing here is DeepSpeed's: no capacity buffer, no all-to-all, no one-hot. A token has a list of experts that it goes
to; an expert has a list of tokens; where the list is full, a token is left out.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from ch05_deepspeed_megatron.moe_model import Experts


class OneProcessMoE(nn.Module):
    """
    Attributes:
        auxiliary: of the last forward pass: experts x sum over experts of (mean probability x share of first choices).
    """

    def __init__(self, expert: nn.Module, hidden: int, spec: Experts) -> None:
        super().__init__()
        self.spec = spec
        self.gate = nn.Linear(hidden, spec.experts, bias=False)
        self.experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(spec.experts))
        for one in self.experts:  # each another
            for parameter in one.parameters():
                nn.init.normal_(parameter, std=0.2)
        if spec.residual:
            self.mlp, self.coefficient = expert, nn.Linear(hidden, 2)
        self.auxiliary = torch.zeros(())

    def forward(self, x_bth: torch.Tensor) -> torch.Tensor:
        x_sh = x_bth.flatten(0, 1)
        probability_se = self.gate(x_sh).softmax(-1)
        choice_sk = probability_se.topk(self.spec.top_k).indices
        self.auxiliary = self.balance(probability_se, choice_sk[:, 0])
        accepted = self.accept(choice_sk)
        weight_sk = self.weights(probability_se, choice_sk, accepted)
        out_sh = torch.zeros_like(x_sh)
        for number, expert in enumerate(self.experts):
            token, k = ((choice_sk == number) & accepted).nonzero(as_tuple=True)
            out_sh = out_sh.index_add(0, token, expert(x_sh[token]) * weight_sk[token, k, None])
        out_bth = out_sh.view_as(x_bth)
        if self.spec.residual:
            mixed = self.coefficient(x_bth).softmax(-1)
            out_bth = out_bth * mixed[..., :1] + self.mlp(x_bth) * mixed[..., 1:]
        return out_bth

    def balance(self, probability_se: torch.Tensor, first_s: torch.Tensor) -> torch.Tensor:
        share_e = torch.bincount(first_s, minlength=self.spec.experts) / len(first_s)  # a constant: no gradient
        return self.spec.experts * (probability_se.mean(0) * share_e).sum()

    def accept(self, choice_sk: torch.Tensor) -> torch.Tensor:
        """[s, k] bool: first come, first served, and all first choices before any second."""
        accepted = torch.ones_like(choice_sk, dtype=torch.bool)
        if not self.spec.drop_tokens:
            return accepted
        room = [self.spec.capacity(len(choice_sk))] * self.spec.experts
        for k in range(self.spec.top_k):
            for token, expert in enumerate(choice_sk[:, k].tolist()):
                accepted[token, k] = room[expert] > 0
                room[expert] -= 1
        return accepted

    def weights(self, probability_se: torch.Tensor, choice_sk: torch.Tensor, accepted: torch.Tensor) -> torch.Tensor:
        """[s, k]: of one expert its probability as it is; of two accepted ones what they have of their sum."""
        weight_sk = probability_se.gather(1, choice_sk) * accepted
        if self.spec.top_k == 1:
            return weight_sk
        return weight_sk / weight_sk.sum(1, keepdim=True).clamp(min=torch.finfo(weight_sk.dtype).eps)
