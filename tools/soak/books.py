"""What answers said that they cost, and whether the service's books say the same. Knows numbers, not requests.

An answer that came whole is in the books exactly once. One that was cut short costs between nothing and all that it
could have become. So each account has a least and a most; where nothing was cut short they are equal.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

NAMES = {
    "requests": "num_model_requests",
    "prompt": "input_tokens",
    "completion": "output_tokens",
    "cached": "input_cached_tokens",
}
Account = tuple[str, str]
"""Tenant, key; a deleted tenant has one account, with no key."""


@dataclass
class Books:
    least: defaultdict[Account, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    unsure: defaultdict[Account, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    deleted: set[str] = field(default_factory=set)
    num_told: int = 0
    num_cut_short: int = 0

    def told(self, account: Account, usage: Mapping[str, object]) -> None:
        """`usage` of an answer that came whole."""
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens", 0) if isinstance(details, dict) else 0
        self.num_told += 1
        self.least[account] += Counter(
            requests=1,
            prompt=int(str(usage["prompt_tokens"])),
            completion=int(str(usage.get("completion_tokens", 0))),
            cached=cached,
        )

    def cut_short(self, account: Account, max_prompt: int, max_completion: int) -> None:
        """A request whose answer never came whole; what it may have cost at most."""
        self.num_cut_short += 1
        self.unsure[account] += Counter(requests=1, prompt=max_prompt, completion=max_completion, cached=max_prompt)

    def compare(self, results: list[dict[str, object]]) -> tuple[list[str], dict[str, int]]:
        """The service's results by tenant and key against ours: what does not fit, and how many accounts do how."""
        theirs: defaultdict[Account, Counter[str]] = defaultdict(Counter)
        for result in results:
            account = self._account(str(result["tenant_id"]), str(result["api_key_id"] or ""))
            theirs[account] += Counter({name: int(str(result[field])) for name, field in NAMES.items()})
        least, unsure = self._merged(self.least), self._merged(self.unsure)
        wrong, kinds = [], Counter[str]()
        for account in sorted(least.keys() | unsure.keys() | theirs.keys()):
            low, high = least[account], least[account] + unsure[account]
            found = theirs[account]
            if all(low[name] <= found[name] <= high[name] for name in NAMES):
                kinds["bounded" if unsure[account] else "exact"] += 1
            else:
                wrong.append(f"{account}: told {dict(low)} to {dict(high)}, the books say {dict(found)}")
        return wrong, dict(kinds)

    def _account(self, tenant: str, key: str) -> Account:
        return (tenant, "") if tenant in self.deleted else (tenant, key)

    def _merged(self, entries: Mapping[Account, Counter[str]]) -> defaultdict[Account, Counter[str]]:
        """Under the names that the service has them by now."""
        merged: defaultdict[Account, Counter[str]] = defaultdict(Counter)
        for (tenant, key), counts in entries.items():
            merged[self._account(tenant, key)] += counts
        return merged
