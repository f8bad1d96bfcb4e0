"""Attention of whole rows in one C++ call: against the definition, also without AVX-512, on any number of threads."""

import pytest
import torch
from compare import check

import kernels
from kernels.cpu import attention, native_attention, pairs


def case(B: int, T: int, H: int, G: int, C: int) -> dict[str, torch.Tensor]:
    return {"q": torch.randn(B, T, H, C), "k": torch.randn(B, T, G, C), "v": torch.randn(B, T, G, C)}


def documents_of(kind: str, B: int, T: int) -> torch.Tensor | None:
    if kind == "one":
        return None
    if kind == "many":
        return (torch.rand(B, T) < 0.3).long().cumsum(1) - 2
    if kind == "of every length":
        return (torch.rand(B, T) < 0.02).long().cumsum(1) * 10**12
    return torch.randint(0, 2, (B, T))  # neighbours that come and go, which the library does not take


@pytest.mark.parametrize("kind", ["one", "many", "of every length", "mixed"])
@pytest.mark.parametrize(
    ("B", "T", "H", "G", "C"), [(1, 1, 1, 1, 16), (2, 63, 4, 1, 48), (3, 130, 6, 2, 16), (1, 600, 3, 3, 32)]
)
def test_it_is_the_definition(B, T, H, G, C, kind, products):
    inputs, documents = case(B, T, H, G, C), documents_of(kind, B, T)
    suited = products != "batched" and (kind != "mixed" or T == 1)
    assert (native_attention.document_starts(inputs["q"].bfloat16(), documents) is not None) == suited
    # With one key the softmax is constant: the gradient of q is 0, and its error is that of two terms of about 1.
    check(kernels.attention, inputs, torch.bfloat16, fixed=(documents,), floor=1.0 if T == 1 else 0.1)


def both_ways(q, k, v, documents=None) -> tuple[torch.Tensor, ...]:
    out, lse = attention.attention_forward(q, k, v, documents)
    return out, lse, *attention.attention_backward(out.flip(0), q, k, v, documents, out, lse)


def test_bits_depend_on_neither_threads_nor_other_rows(products, monkeypatch):
    if products == "batched":  # oneDNN's own products promise neither
        monkeypatch.setattr(pairs, "fastest", lambda: True)
    given = [tensor.bfloat16() for tensor in case(4, 300, 4, 2, 32).values()]
    documents = documents_of("of every length", 4, 300)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(both_ways(*given, documents))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    given[1][3], given[2][3] = torch.nan, torch.inf
    spoiled = attention.attention_forward(*given, documents)
    assert all(torch.equal(a[:3], b[:3]) for a, b in zip(spoiled, found[0], strict=False))
    assert spoiled[0][3].isnan().all()


def test_what_it_does_not_suit_goes_the_other_way(monkeypatch):
    monkeypatch.setattr(pairs, "fastest", lambda: True)
    q, documents = torch.empty(1, 4, 2, 16), torch.tensor([[3, 3, 5, 5]])
    assert native_attention.document_starts(q.bfloat16(), documents).tolist() == [[0, 0, 2, 2]]
    assert native_attention.document_starts(q.bfloat16(), None).tolist() == [[0, 0, 0, 0]]
    assert native_attention.document_starts(q, documents) is None
    assert native_attention.document_starts(q.bfloat16(), documents.flip(1)) is None
    assert native_attention.document_starts(torch.empty(1, 4, 2, 24).bfloat16(), documents) is None


@pytest.mark.parametrize("starts", [[[0, 0, 3, 3]], [[0, -1, 0, 0]], [[0, 1, 0, 0]]])
def test_starts_that_are_none_are_refused(starts):
    q, k, v = (tensor.bfloat16() for tensor in case(1, 4, 2, 1, 16).values())
    with pytest.raises(AssertionError, match="not those of documents"):
        native_attention.forward(q, k, v, torch.tensor(starts))
