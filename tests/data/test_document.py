"""What is kept of many documents does not depend on where they stand."""

from hypothesis import given
from hypothesis import strategies as st

from lmplay.data.document import Document, FairSample


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), num_bytes=st.integers(1, 300))
def test_a_fair_sample_does_not_depend_on_the_order_of_the_source(sizes, num_bytes):
    found = [Document(f"{i:03}" + "x" * size, None, row=i) for i, size in enumerate(sizes)]
    sample, other = FairSample(num_bytes), FairSample(num_bytes)
    for document, another in zip(found, reversed(found), strict=True):
        sample.add(document)
        other.add(another)
    sample, other = list(sample), list(other)
    places = sorted(document.place for document in found)

    assert sample == other
    assert [document.place for document in sample] == places[: len(sample)]
    if len(sample) < len(found):
        assert sum(document.num_bytes for document in sample) >= num_bytes
    assert sum(document.num_bytes for document in sample[:-1]) < num_bytes
