from base.words import nearest


def test_near_names_else_all():
    assert nearest("captoin", ["image", "caption"]) == "the nearest: caption"
    assert nearest("zzz", ["b", "a"]) == "there are: a, b"
    assert nearest("zzz", [f"a{i}" for i in range(5)], most=2) == "there are: a0, a1, and 3 more"
