"""Attention masks as a few integers per token: which keys each query sees, and which queries see each key.

    visible(i, j) = lo_i <= j < hi_i  and  since_j <= i < until_j

Causal text, bidirectional images (Transfusion, arXiv:2408.11039, section 3.2), packed documents, padding, sliding
windows and BAGEL's hidden noised copies (arXiv:2505.14683) all have this form: a query sees one run of keys, and a key
is seen by one run of queries. A tile of queries therefore needs the keys [min lo, max hi) and needs no mask at all
between max lo and min hi; the backward pass reads the same two facts from the key side. The mask is O(S) integers (16
bytes a token), made on the device without a host synchronisation, and one object serves every layer.
"""
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tfkernels._arguments import INT32, looks, need_integer, need_integers, need_range
from tfkernels.mask.arguments import (
    checked_dense,
    checked_documents,
    checked_spans,
    checked_window,
    described,
    documents_of_lengths,
    int32,
    moved,
)
from tfkernels.mask.counting import visible_keys
from tfkernels.mask.flex_attention import block_mask
from tfkernels.mask.intervals import intervals
from tfkernels.mask.pairs import Hulls, block_mask_rows, exact_hulls, need_block_mask

_FAR = INT32[1]


@dataclass(frozen=True, eq=False)
class TransfusionMask:
    """Which keys each query sees.

    Build one with `from_spans`, `from_token_types`, `causal`, `from_cu_seqlens`, `from_cache`, `from_intervals`,
    `from_dense` or `from_block_mask`, or with a published model's recipe (`tfkernels.mask.recipes`); `python -m
    tfkernels.mask` draws them.

    Attributes (Sq queries, Sk keys; all int32; a batch of 1 serves every batch row):
        lo, hi: (B, Sq) query i sees the keys [lo_i, hi_i); an empty row (lo >= hi) sees nothing: attention gives 0.
        key_since, key_until: (B, Sk) no query outside [key_since_j, key_until_j) sees key j. They are `since` and
            `until`, and are filled in from lo and hi where those say it all: the backward reads a mask from this side.
        rows_exact: lo and hi alone define the mask.
        columns_exact: key_since and key_until alone define the mask.
        offset: number of the first query; query row r stands at position offset + r.
    """

    lo: Tensor
    hi: Tensor
    key_since: Tensor
    key_until: Tensor
    rows_exact: bool = True
    columns_exact: bool = True
    offset: int = 0

    def __post_init__(self):
        """Of inference tensors, make plain ones: backward may keep these, and attention remembers what all layers read
        off them."""
        if torch.compiler.is_compiling():
            return
        found = [(name, x) for name, x in vars(self).items() if isinstance(x, Tensor) and x.is_inference()]
        if found:
            with torch.inference_mode(False):
                for name, x in found:
                    object.__setattr__(self, name, x.clone())

    @classmethod
    def from_spans(cls, spans, seq_len, documents=None, hidden=None, window=None, device=None) -> "TransfusionMask":
        """Causal attention in which the tokens of each span (one image) see each other.

        Args:
            spans: per batch row a list of (start, end), or an integer tensor (B, M, 2) padded with start == end.
                Lists and CPU tensors are checked; CUDA tensors are not (that would wait for the device): there a span
                is clipped to the sequence and to the document that a token lies in.
            seq_len: S, the number of tokens.
            documents: (B, S) non-decreasing document ids; tokens of different documents do not see each other; -1 is
                padding, which sees nothing, is seen by nothing and ends the document before it. On CUDA, where they are
                not checked, each run of one id is a document. Tensors, arrays and nested lists fit.
            hidden: spans, in the form of `spans`, whose tokens only the same span's tokens see (noised copies).
            window: keys a query looks back on, itself included; ahead, a query in an image sees the whole image. This
                is the rule of Gemma 3's sliding layers, window and (causal or same image): of an image longer than the
                window a query does not see the beginning. `recipes.window_around_whole_images` leaves images whole.
            device: where the mask lives; by default where the tensors given are.

        Raises:
            ValueError: a span leaves the sequence, overlaps another, ends before it starts or is cut by a document's
                end; a shape or value does not fit.
        """
        seq_len = need_integer("TransfusionMask.from_spans", "seq_len", seq_len)
        if window is not None:
            window = min(checked_window("TransfusionMask.from_spans", window), max(1, seq_len))
        documents = checked_documents("TransfusionMask.from_spans", documents, seq_len, device)
        device = device if device is not None else documents.device if documents is not None else None
        spans = checked_spans("spans", spans, seq_len, device, documents)
        hidden = None if hidden is None else checked_spans("hidden", hidden, seq_len, spans.device, documents)
        return cls._build("TransfusionMask.from_spans", spans, None, documents, hidden, seq_len, window)

    @classmethod
    def from_token_types(cls, token_types, documents=None) -> "TransfusionMask":
        """Causal attention in which each run of one value k > 0 in `token_types` (B, S) is an image that sees itself; 0
        is text.

        token_types may be bool, an array or nested lists. A run ends where its document does: two documents that meet
        in images of one k have an image each. Negative types are refused on a CPU and are text on CUDA. documents: as
        in `from_spans`.
        """
        op, fits = "TransfusionMask.from_token_types", "(B, S), 0 for text and k > 0 for image k,"
        token_types = need_integers(op, "token_types", token_types, fits, flags=True)
        if token_types.ndim != 2:
            raise ValueError(f"{op}: token_types is {described(token_types)}; an integer tensor {fits} fits")
        if token_types.dtype != torch.bool:
            most = torch.iinfo(token_types.dtype).max
            need_range(op, "token_types", token_types, 0, most, "0 for text and k > 0 for image k")
        seq_len = token_types.shape[1]
        documents = checked_documents(op, documents, seq_len, token_types.device)
        return cls._build(op, None, token_types, documents, None, seq_len, None)

    @classmethod
    def causal(cls, seq_len, documents=None, window=None, device=None) -> "TransfusionMask":
        """Plain causal attention: `from_spans` without images, one mask for every batch row."""
        return cls.from_spans([[]], seq_len, documents=documents, window=window, device=device)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens, seq_len, spans=None, hidden=None, window=None,
                        device=None) -> "TransfusionMask":
        """Sequences laid one after another in one batch row, as variable-length attention takes them: each a document.

        Args:
            cu_seqlens: (N + 1,) integers that never fall: sequence n is the tokens [cu_seqlens[n], cu_seqlens[n + 1]),
                and may be empty. What lies before the first and behind the last is padding. Numbers that fall or leave
                [0, seq_len] are refused on a CPU; on CUDA, where looking would wait for the device, they are not.
            seq_len: the number of all tokens, those of padding included.
            spans, hidden, window, device: as in `from_spans`, with one batch row whose tokens are counted through. The
                tokens of a sequence that is also a span all see each other.

        q, k and v of flash-attn's form (tokens, heads, D) fit as x.transpose(0, 1)[None], which copies nothing.
        """
        op = "TransfusionMask.from_cu_seqlens"
        seq_len = need_integer(op, "seq_len", seq_len)
        documents = documents_of_lengths(op, cu_seqlens, seq_len, device)
        return cls.from_spans([[]] if spans is None else spans, seq_len, documents=documents, hidden=hidden,
                              window=window, device=documents.device)

    @classmethod
    def from_cache(cls, cached_lens, query_len, key_len, image=False, window=None) -> "TransfusionMask":
        """Cached inference: row b's cache holds cached_lens[b] tokens, and its query_len newest ones right behind them.

        visible(r, j) = j < cached_len + (query_len if image else r + 1)  and  cached_len + r - j < window

        Args:
            cached_lens: (B,) integers, tokens before the new ones; rows may differ. Less than 0 or more than key_len -
                query_len is refused on a CPU; on CUDA, where looking would wait for the device, it is clipped to that
                range.
            query_len: new tokens: 1 for decoding, the prompt's length for a prefill, the patches of an image while it
                is denoised.
            key_len: columns of the cache, new tokens included; those behind a row's own are not seen.
            image: the new tokens are one image and all see each other.
            window: keys a query looks back on, itself included, by the rule of `from_spans`; None for all.
        """
        op = "TransfusionMask.from_cache"
        window = INT32[1] if window is None else checked_window(op, window)
        cached_lens = need_integers(op, "cached_lens", cached_lens, "(B,)")
        if cached_lens.ndim != 1:
            raise ValueError(f"{op}: cached_lens is {described(cached_lens)}; an integer tensor (B,) fits: tokens "
                             "before the new ones")
        query_len, key_len = need_integer(op, "query_len", query_len), need_integer(op, "key_len", key_len)
        if query_len > key_len:
            raise ValueError(f"{op}: query_len is {query_len} and key_len {key_len}; 0 <= query_len <= key_len fits: "
                             "the cache holds the new tokens too")
        need_range(op, "cached_lens", cached_lens, 0, key_len - query_len,
                   f"for key_len {key_len} holds the {query_len} new tokens too; make the cache longer")
        cached = cached_lens.long().clamp(0, key_len - query_len).int()[:, None]           # (B, 1)
        order = torch.arange(query_len, device=cached.device, dtype=torch.int32)
        keys = torch.arange(key_len, device=cached.device, dtype=torch.int32)
        hi = cached + (torch.full_like(order, query_len) if image else order + 1)
        seen_by = torch.zeros_like(keys - cached) if image else (keys - cached).clamp(min=0)
        first = torch.where(keys < cached + query_len, seen_by, query_len)
        if window >= key_len:
            return cls(torch.zeros_like(hi), hi, first, torch.full_like(first, query_len))
        lo = (cached + order + 1 - window).clamp(min=0)
        return cls(lo, hi, first, (keys - cached + window).clamp(0, query_len))

    @classmethod
    def from_intervals(
        cls, lo, hi, since=None, until=None, key_len=None, offset=0, columns_exact=False
    ) -> "TransfusionMask":
        """Build a mask of integers `lo`, `hi` (B, Sq) and optionally `since`, `until` (B, Sk), the general form.

        Without since and until, and without key_len, there are as many keys as queries.

        Tensors, arrays and nested lists fit. Numbers that int32 does not hold are refused on a CPU and clipped to its
        range on CUDA.

        `columns_exact=True` promises that lo and hi never decrease over the rows that see something; the backward pass
        then skips comparing rows. A promise that does not hold gives wrong gradients.
        """
        op = "TransfusionMask.from_intervals"
        lo, hi = need_integers(op, "lo", lo, "(B, Sq)"), need_integers(op, "hi", hi, "(B, Sq)")
        if lo.ndim != 2 or lo.shape != hi.shape or lo.device != hi.device:
            raise ValueError(f"{op}: lo is {described(lo)} and hi is {described(hi)}; two integer tensors (B, Sq) on "
                             "one device fit")
        if (since is None) != (until is None):
            raise ValueError(f"{op}: since and until come together; pass both or neither")
        if since is not None:
            since = need_integers(op, "since", since, "(B, Sk), one per key,")
            until = need_integers(op, "until", until, "(B, Sk), one per key,")
        if key_len is None:
            key_len = lo.shape[1] if since is None else since.shape[-1] if since.ndim else 0
        key_len, offset = need_integer(op, "key_len", key_len), need_integer(op, "offset", offset)
        for name, x in (("since", since), ("until", until)):
            shaped = x is None or x.ndim == 2 and x.shape[0] in (1, lo.shape[0]) and x.shape[1] == key_len
            if not shaped or x is not None and x.device != lo.device:
                raise ValueError(f"{op}: {name} is {described(x)}; an integer tensor ({lo.shape[0]}, {key_len}) on "
                                 f"{lo.device} fits, one per key")
        lo, hi = int32(op, "lo", lo), int32(op, "hi", hi)
        since, until = int32(op, "since", since), int32(op, "until", until)
        if since is not None:  # what lies before the first query is 0, from which an offset can be taken away
            since, until = since.clamp(min=0), until.clamp(min=0)
        return cls._from_rows(lo, hi, since, until, key_len, offset, columns_exact=columns_exact)

    @classmethod
    def from_dense(cls, visible) -> "TransfusionMask":
        """Read the integers off a dense bool mask of another library: O(Sq * Sk), waits for the device.

        visible: (B, 1, Sq, Sk), (B, Sq, Sk), or (Sq, Sk) for every batch row.

        Raises:
            ValueError: the mask is not the meeting of one run of keys per query and one run of queries per key; the
                first pair in the way is named.
        """
        op = "TransfusionMask.from_dense"
        visible = checked_dense(op, visible)
        pairs = visible[None] if visible.ndim == 2 else visible.flatten(0, -3)             # (B, Sq, Sk)

        def name(*at: int) -> str:
            return f"visible[{', '.join(map(str, {2: at[1:], 3: at, 4: (at[0], 0, *at[1:])}[visible.ndim]))}]"

        return cls._of_hulls(exact_hulls(op, lambda start, stop: pairs[:, start:stop], *pairs.shape, name))

    @classmethod
    def from_block_mask(cls, block_mask) -> "TransfusionMask":
        """Read the integers off a FlexAttention BlockMask, by its tiles and its mask_mod: O(Sq * Sk) time, O(S) memory,
        waits for the device.

        The mask has the BlockMask's batch size. One mask for all heads fits.

        Raises:
            ValueError: heads differ, or the mask is not the meeting of one run of keys per query and one run of
                queries per key; the first pair in the way is named.
        """
        op = "TransfusionMask.from_block_mask"
        need_block_mask(op, block_mask)
        rows_of = block_mask_rows(op, block_mask)
        return cls._of_hulls(exact_hulls(op, rows_of, block_mask.kv_num_blocks.shape[0], *block_mask.seq_lengths,
                                         lambda b, i, j: f"block_mask[{b}, 0, {i}, {j}]"))

    @classmethod
    def _of_hulls(cls, found: Hulls) -> "TransfusionMask":
        return cls(found.lo, found.hi, found.since, found.until, bool(found.rows_exact), bool(found.columns_exact))

    @classmethod
    def _build(cls, op: str, spans: Tensor | None, types: Tensor | None, documents: Tensor | None,
               hidden: Tensor | None, seq_len: int, window: int | None) -> "TransfusionMask":
        given = {"spans": spans, "token_types": types, "documents": documents, "hidden": hidden}
        batch = max(x.shape[0] for x in given.values() if x is not None)
        for name, x in given.items():
            if x is not None and x.shape[0] not in (1, batch):
                raise ValueError(f"{op}: {name} has {x.shape[0]} batch rows where another argument has {batch}; the "
                                 "same number, or 1 for all, fits")
        documents = documents if documents is None else documents.to((spans if types is None else types).device)
        return cls(*intervals(spans, types, documents, hidden, batch, seq_len, window or 0), hidden is None)

    @classmethod
    def _from_rows(cls, lo, hi, since, until, key_len, offset, *, columns_exact):
        """Add the key side: key_since_j is the first row with hi > j and key_until_j the last with lo <= j.

        Where since and until are given, they cut these intervals.
        """
        empty = lo >= hi
        reach = torch.where(empty, -1, hi).cummax(1).values  # rows so far reach keys < reach_i
        floor = torch.where(empty, _FAR, lo).flip(1).cummin(1).values.flip(1)  # rows from here on start at floor_i
        keys = torch.arange(key_len, device=lo.device, dtype=torch.int32).repeat(lo.shape[0], 1)
        key_since = torch.searchsorted(reach.contiguous(), keys, right=True, out_int32=True) + offset
        key_until = torch.searchsorted(floor.contiguous(), keys, right=True, out_int32=True) + offset
        if since is not None:
            key_since, key_until = torch.maximum(key_since, since), torch.minimum(key_until, until)
        return cls(lo.contiguous(), hi.contiguous(), key_since, key_until, since is None, columns_exact, offset)

    @property
    def since(self) -> Tensor | None:
        """(B, Sk) first query that may see each key; None where `lo` and `hi` say it all."""
        return None if self.rows_exact else self.key_since

    @property
    def until(self) -> Tensor | None:
        """(B, Sk) end of the queries that may see each key; None where `lo` and `hi` say it all."""
        return None if self.rows_exact else self.key_until

    @property
    def query_lo(self) -> Tensor:
        """`key_since` by its older name."""
        return self.key_since

    @property
    def query_hi(self) -> Tensor:
        """`key_until` by its older name."""
        return self.key_until

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, 1, Sq, Sk), that of `dense()`."""
        return self.batch_size, 1, self.query_len, self.key_len

    @property
    def ndim(self) -> int:
        """4, as many as `dense()` has: what takes a mask for a tensor finds the size of one."""
        return 4

    @property
    def batch_size(self) -> int:
        """B; 1 serves every batch size."""
        return self.lo.shape[0]

    @property
    def query_len(self) -> int:
        """Sq."""
        return self.lo.shape[1]

    @property
    def key_len(self) -> int:
        """Sk."""
        return self.key_since.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.lo.device

    def to(self, device, non_blocking: bool = False) -> "TransfusionMask":
        """Return the same mask on `device`. Copies to the host wait and others do not, whatever `non_blocking` says."""
        lo, hi, key_since, key_until = (moved(t, device) for t in (self.lo, self.hi, self.key_since, self.key_until))
        return replace(self, lo=lo, hi=hi, key_since=key_since, key_until=key_until)

    def queries(self, start: int, stop: int) -> "TransfusionMask":
        """Return the mask of queries [start, stop) and the same keys: cached decoding, chunked prefill, one image."""
        start = need_integer("TransfusionMask.queries", "start", start, INT32[0])
        stop = need_integer("TransfusionMask.queries", "stop", stop, INT32[0])
        if not 0 <= start <= stop <= self.query_len:
            raise ValueError(f"TransfusionMask.queries: [start, stop) is [{start}, {stop}); a range within [0, "
                             f"{self.query_len}) fits")
        return replace(self, lo=self.lo[:, start:stop], hi=self.hi[:, start:stop], offset=self.offset + start)

    def keys(self, start: int, stop: int) -> "TransfusionMask":
        """Return the mask of the same queries and keys [start, stop): one part of a row's keys, whose attention is
        merged with that of the other parts (`tfkernels.parallel`). A query that sees none of them has an empty row."""
        start = need_integer("TransfusionMask.keys", "start", start, INT32[0])
        stop = need_integer("TransfusionMask.keys", "stop", stop, INT32[0])
        if not 0 <= start <= stop <= self.key_len:
            raise ValueError(f"TransfusionMask.keys: [start, stop) is [{start}, {stop}); a range within [0, "
                             f"{self.key_len}) fits")
        lo, hi = (end.clamp(start, stop) - start for end in (self.lo, self.hi))
        return replace(self, lo=lo, hi=hi, key_since=self.key_since[:, start:stop],
                       key_until=self.key_until[:, start:stop])

    def select_queries(self, rows: Tensor) -> "TransfusionMask":
        """Return the mask of the queries `rows`, several runs of them put one after another, and the same keys.

        rows: (R,) int64 numbers of queries, strictly ascending. A key is seen by one run of queries, so it is seen by
        one run of any of them: the result is a mask like any other, whose queries are numbered from 0. On CUDA, where
        looking would wait for the device, `rows` is not checked.
        """
        rows = _ascending("TransfusionMask.select_queries", "rows", rows, self.query_len, self.lo.device)
        key_since, key_until = (torch.searchsorted(rows + self.offset, end.long(), out_int32=True)
                                for end in (self.key_since, self.key_until))
        return replace(self, lo=self.lo[:, rows], hi=self.hi[:, rows], key_since=key_since, key_until=key_until,
                       offset=0)

    def select_keys(self, columns: Tensor) -> "TransfusionMask":
        """Return the mask of the same queries and the keys `columns`, given as `select_queries` takes queries."""
        columns = _ascending("TransfusionMask.select_keys", "columns", columns, self.key_len, self.lo.device)
        lo, hi = (torch.searchsorted(columns, end.long(), out_int32=True) for end in (self.lo, self.hi))
        return replace(self, lo=lo, hi=hi, key_since=self.key_since[:, columns], key_until=self.key_until[:, columns])

    def dense(self) -> Tensor:
        """Return the mask as (B, 1, Sq, Sk) bool, True where visible: for tests and for SDPA. O(Sq * Sk) memory."""
        rows = torch.arange(self.offset, self.offset + self.query_len, device=self.lo.device)[:, None]
        keys = torch.arange(self.key_len, device=self.lo.device)
        visible = (self.lo[..., None] <= keys) & (keys < self.hi[..., None])
        if not self.rows_exact:
            visible &= (self.key_since[:, None] <= rows) & (rows < self.key_until[:, None])
        return visible[:, None]

    def visible_keys(self) -> Tensor:
        """Return how many keys each query sees, (B, Sq) int64, in O(S log S) time and O(S) memory."""
        return visible_keys(self.lo, self.hi, self.key_since, self.key_until, self.rows_exact, self.offset)

    def area(self) -> Tensor:
        """Return the number of visible (query, key) pairs of all batch rows, an int64 scalar on the device."""
        return self.visible_keys().sum()

    def block_mask(self, block_size: int = 128):
        """Return FlexAttention's BlockMask, built from tile bounds: O((S / block_size)^2), no S x S tensor."""
        return block_mask(self, need_integer("TransfusionMask.block_mask", "block_size", block_size, 1))


def _ascending(op: str, name: str, x: Tensor, size: int, device: torch.device) -> Tensor:
    """Return (R,) int64 numbers on `device`; where looking is free, refuse those that do not ascend in [0, size)."""
    x = need_integers(op, name, x, f"(R,) of ascending numbers from 0 to {size - 1}", device)
    if x.ndim != 1:
        raise ValueError(f"{op}: {name} is {described(x)}; an integer tensor (R,) fits")
    need_range(op, name, x, 0, size - 1, f"for there are {size}")
    if looks(x) and bool((x[1:] <= x[:-1]).any()):
        raise ValueError(f"{op}: {name} does not ascend; each number larger than the one before it fits; sort them")
    return x.long()
