"""Methods that only ask the language model, without any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metarec.reader import Reader
from metarec.scorer import Request
from metarec.scorers.residuals import check_codes


@dataclass(frozen=True)
class ZeroShot:
    """Scores an item by the frozen model's log-odds of the yes word, whoever asks."""

    reader: Reader
    name: str = "zero-shot prompt"
    bytes_per_user: int = 0

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[Tensor]:
        """See `Scorer.score`."""
        check_codes(requests, len(self.reader.prompts.tokens))
        return [
            self.reader.log_odds(self.reader.gather(torch.from_numpy(request.candidates)[None]), None)[0].cpu()
            for request in requests
        ]
