from lmplay.seeds import stream_seed


def test_streams_of_randomness_differ_by_seed_and_purpose():
    seeds = {stream_seed(seed, purpose) for seed in range(9) for purpose in ("weights", "dropout")}

    assert len(seeds) == 18
