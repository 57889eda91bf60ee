"""Beginnings of prompts that are computed already: a tree of token blocks for each key, kept while memory is free.

A key is a tenant and an adapter digest (the tenant is left out where tenants share); a node is reached by the very
tokens it stands for, so nothing but the same prompt of the same key finds it. Keys and values are copied from the tree
into the row of the sequence that starts and back when a block has been computed: nobody reads another's row. Blocks
lie on the grid on which attention cuts every prompt, so a copied block has the bits that computing it would give.

Knows sequences and blocks; the tensors are the `KvCache`'s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from service.engine.kv_cache import KvCache, Row
from service.engine.sequence import Sequence, SequenceStatus

Key = tuple[str | None, str | None]
"""Tenant (None where tenants share) and adapter digest (None is the base)."""

_LEAST_COMPUTED = 4
"""Prompt tokens always computed. One would do to sample; products of fewer rows may round differently on CPU."""


@dataclass(eq=False, slots=True)
class _Node:
    """A block of tokens after those of its ancestors. `row` holds it; `owner` is computing it."""

    tokens: tuple[int, ...]
    parent: _Node | None
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    row: Row | None = None
    owner: Sequence | None = None
    key: Key | None = None  # of a root, which stands for no tokens

    @property
    def is_used(self) -> bool:
        return bool(self.children) or self.row is not None or self.owner is not None


class PrefixCache:
    """Finds, copies and keeps blocks; gives them up, least recently used first, when memory is wanted."""

    def __init__(self, cache: KvCache, *, shared: bool) -> None:
        self._cache = cache
        self._block = cache.block
        self._shared = shared
        self._roots: dict[Key, _Node] = {}
        self._kept: OrderedDict[_Node, None] = OrderedDict()  # least recently used first, so children before parents
        self._in_slab: OrderedDict[int, set[_Node]] = OrderedDict()  # least recently used slab first
        self._claims: dict[Sequence, list[_Node]] = {}
        cache.empty_block_slab = self._empty_slab

    def match(self, sequence: Sequence) -> int | None:
        """Prompt tokens that can be copied; None while a running sequence is computing more of them."""
        if sequence.needs_all_hidden:
            return 0
        kept = coming = 0
        usable = max(0, sequence.num_prompt_tokens - _LEAST_COMPUTED) // self._block
        for depth, node in enumerate(self._path(sequence, usable), start=1):
            if node.row is not None:
                kept = depth
            elif node.owner is not None and _is_worth_waiting_for(node.owner, sequence):
                coming = depth
            else:
                break
        return None if coming > kept else kept * self._block

    def fetch(self, sequence: Sequence, row: Row, num_tokens: int) -> None:
        """Copy what `match` found into the sequence's row; whoever needs the blocks that follow waits for it."""
        path = list(self._path(sequence, num_tokens // self._block))
        if path:
            sources = [(node.row, 0) for node in path if node.row is not None]
            self._cache.copy(sources, [(row, index * self._block) for index in range(len(sources))])
            self._touch(path)
        self._claim(sequence)

    def keep(self, sequence: Sequence, row: Row) -> None:
        """Copy the blocks that the sequence has just computed out of its row, as far as memory is free."""
        if sequence not in self._claims:
            return
        path = list(self._path(sequence, min(sequence.num_computed, sequence.num_prompt_tokens) // self._block))
        self._touch([node for node in path if node.row is not None])
        sources, targets = [], []
        for index, node in enumerate(path):
            if node.row is None:
                node.row = self._room(path)
                if node.row is None:
                    break
                sources.append((row, index * self._block))
                targets.append((node.row, 0))
        if sources:
            self._cache.copy(sources, targets)
        self._touch([node for node in path if node.row is not None])
        if not sequence.is_prefill or any(node.row is None for node in path):
            self.leave(sequence)

    def leave(self, sequence: Sequence) -> None:
        """The sequence computes no more of its prompt: nobody need wait for it."""
        for node in reversed(self._claims.pop(sequence, ())):
            if node.owner is sequence:
                node.owner = None
            self._prune(node)

    def drop(self, adapter: str) -> None:
        """Forget everything computed with a deleted adapter, at once."""
        for key in [key for key in self._roots if key[1] == adapter]:
            self._evict(self._roots.pop(key))

    def drop_tenant(self, tenant: str) -> None:
        """Forget what was computed for a deleted tenant; everything, where tenants share: nobody knows whose it is."""
        for key in [key for key in self._roots if key[0] in (None, tenant)]:
            self._evict(self._roots.pop(key))

    def tenants(self) -> set[str | None]:
        """Whose blocks are kept; None where tenants share."""
        return {key[0] for key in self._roots}

    def check_integrity(self, is_idle: bool) -> None:
        """Every block belongs to one node that can be reached, and when idle nobody is being waited for."""
        reached = [node for root in self._roots.values() for node in _subtree(root) if node.row is not None]
        assert set(reached) == set(self._kept), "kept blocks cannot be reached"
        assert len({node.row for node in reached}) == len(reached) == self._cache.num_blocks, "blocks leaked"
        assert all(node.parent is None or node.parent.parent is None or node.parent.row for node in reached)
        assert not (is_idle and self._claims), "somebody who has gone is being waited for"

    def _key(self, sequence: Sequence) -> Key:
        request = sequence.request
        return (None if self._shared else request.tenant, request.adapter)

    def _path(self, sequence: Sequence, num_blocks: int) -> Iterator[_Node]:
        """The nodes of the prompt's first blocks, as far as they are known."""
        node, prompt = self._roots.get(self._key(sequence)), sequence.request.prompt_token_ids
        for start in range(0, num_blocks * self._block, self._block):
            if node is None:
                return
            node = node.children.get(prompt[start : start + self._block])
            if node is not None:
                yield node

    def _claim(self, sequence: Sequence) -> None:
        """Make the sequence the owner of every whole block of its prompt that is not kept."""
        key, prompt = self._key(sequence), sequence.request.prompt_token_ids
        node = self._roots.setdefault(key, _Node((), None, key=key))
        claims = []
        for start in range(0, len(prompt) // self._block * self._block, self._block):
            tokens = prompt[start : start + self._block]
            node = node.children.setdefault(tokens, _Node(tokens, node))
            if node.row is None:
                node.owner = sequence
                claims.append(node)
        if claims:
            self._claims[sequence] = claims
        self._prune(node)

    def _touch(self, path: list[_Node]) -> None:
        for node in reversed(path):
            assert node.row is not None
            self._kept[node] = None
            self._kept.move_to_end(node)
            self._in_slab.setdefault(node.row.slab, set()).add(node)
            self._in_slab.move_to_end(node.row.slab)

    def _room(self, path: list[_Node]) -> Row | None:
        """Room for one more block, if need be that of the least recently used one that is not of this path."""
        row = self._cache.allocate_block()
        while row is None and self._kept:
            oldest = next(iter(self._kept))
            if oldest in path:
                return None
            self._evict(oldest)
            row = self._cache.allocate_block()
        return row

    def _empty_slab(self) -> None:
        """Free the slab that was used the longest ago."""
        for node in list(next(iter(self._in_slab.values()))):
            self._evict(node)

    def _evict(self, top: _Node) -> None:
        """Free the blocks of a node and of all that follow it: without it they cannot be reached."""
        for node in reversed(_subtree(top)):
            if node.row is not None:
                nodes = self._in_slab[node.row.slab]
                nodes.discard(node)
                if not nodes:
                    del self._in_slab[node.row.slab]
                del self._kept[node]
                self._cache.free(node.row)
                node.row = None
            self._prune(node)

    def _prune(self, node: _Node) -> None:
        """Take nodes that stand for nothing out of the tree, from here to the root."""
        while node.parent is not None and not node.is_used:
            if node.parent.children.get(node.tokens) is node:
                del node.parent.children[node.tokens]
            node = node.parent
        if node.key is not None and not node.children and self._roots.get(node.key) is node:
            del self._roots[node.key]


def _is_worth_waiting_for(owner: Sequence, sequence: Sequence) -> bool:
    """Whether the owner goes on computing, and is not behind the sequence in the order of work."""
    same_tenant = owner.request.tenant == sequence.request.tenant
    urgent = owner.request.priority >= sequence.request.priority
    return owner is not sequence and owner.status is SequenceStatus.RUNNING and same_tenant and urgent


def _subtree(top: _Node) -> list[_Node]:
    """Parents before children."""
    nodes = [top]
    for node in nodes:
        nodes.extend(node.children.values())
    return nodes
