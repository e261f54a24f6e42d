"""Configurations are converted once, and every mistake is told with its whole path."""

import dataclasses
from typing import Literal

import ml_collections
import pytest

from data_pipelines.config import DataConfig, GroupConfig, ImageTransform, from_config_dict, load_config


def data(**fields) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({"source": "d", "groups": {"full": {}}} | fields)


def test_nested_values():
    config = from_config_dict(DataConfig, data(
        groups={"full": {"weight": 2, "is_mandatory": True}, "think": {}},
        vae_transform={"stride": 16, "max_size": 64, "min_size": 32}, vae_dropout=0))
    assert config.groups == (GroupConfig("full", 2.0, True), GroupConfig("think", 1.0, False))
    assert config.vae_transform == ImageTransform(16, 64, 32)
    assert config.vae_dropout == 0.0 and isinstance(config.vae_dropout, float)
    assert isinstance(config.groups[0].weight, float)
    as_tuple = from_config_dict(DataConfig, data(groups=({"name": "full"}, {"name": "think"})))
    assert [group.name for group in as_tuple.groups] == ["full", "think"]
    assert as_tuple.vit_transform == DataConfig.vit_transform


@pytest.mark.parametrize("fields, message", [
    (dict(sede=1), "unknown config field 'data.sede'; did you mean 'seed'?"),
    (dict(groups={"full": {"wait": 1}}), "'data.groups.full.wait'; did you mean 'weight'?"),
    (dict(groups=({"name": "a", "weigth": 1},)), r"'data.groups\[0\].weigth'; did you mean"),
    (dict(vae_transform={"stride": 16}), "'data.vae_transform.max_size' is missing"),
    (dict(seed="7"), "'data.seed' is '7' .str.; expected int"),
    (dict(seed=7.0), "'data.seed' is 7.0 .float.; expected int"),
    (dict(seed=True), "'data.seed' is True .bool.; expected int"),
    (dict(ce_reweight=1), "'data.ce_reweight' is 1 .int.; expected bool"),
    (dict(oversize="skip"), r"'data.oversize' is 'skip'; use one of \['bad', 'drop'\]"),
    (dict(groups="full"), "'data.groups' is 'full'; expected a tuple"),
    (dict(vae_transform=16), "'data.vae_transform' is 16; expected fields and values"),
    (dict(groups={}), "config data: groups are"),
    (dict(groups={"a": {"weight": 0.0}}), "config data.groups.a: group 'a' has weight 0.0"),
    (dict(vae_dropout=1.5), "config data: vae_dropout is 1.5; it must be in"),
    (dict(text_tokens=0), "config data: text_tokens is 0; it must be positive"),
    (dict(latent_tokens=-1), "config data: latent_tokens is -1; it cannot be negative"),
    (dict(vit_patch=16), "config data: vit_transform.stride must be a multiple of vit_patch"),
    (dict(groups={"full": {"weight": 1.0, "vit_transform": {"stride": 20, "max_size": 40, "min_size": 20}}}),
     "config data: groups.full.vit_transform.stride must be a multiple of vit_patch"),
    (dict(vae_transform={"stride": 16, "max_size": 100, "min_size": 32}),
     "config data.vae_transform: max_size 100 must be a multiple of stride 16"),
])
def test_mistakes_name_their_path(fields, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        from_config_dict(DataConfig, data(**fields), path="data")


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="'source' is missing and has no default"):
        from_config_dict(DataConfig, {"groups": {"a": {}}})


def test_all_supported_kinds_of_field():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        name: str
        size: int = 1

    @dataclasses.dataclass(frozen=True)
    class Outer:
        pair: tuple[int, float]
        many: tuple[str, ...] = ()
        table: dict[str, float] = dataclasses.field(default_factory=dict)
        maybe: int | None = None
        inner: Inner | None = None
        kind: Literal["a", "b"] = "a"

    config = from_config_dict(Outer, ml_collections.ConfigDict(
        {"pair": [1, 2], "many": ["x"], "table": {"k": 1}, "maybe": None, "inner": {"name": "n"}}))
    assert config == Outer((1, 2.0), ("x",), {"k": 1.0}, None, Inner("n"))
    with pytest.raises(ValueError, match="'pair' has 3 entries; expected 2"):
        from_config_dict(Outer, {"pair": (1, 2, 3)})
    with pytest.raises(ValueError, match="'table.k' is 'x'"):
        from_config_dict(Outer, {"pair": (1, 2), "table": {"k": "x"}})


def test_load_config(tmp_path):
    path = tmp_path / "small.py"
    path.write_text("import ml_collections\n"
                    "def get_config(arg='none'):\n"
                    "    return ml_collections.ConfigDict({'data': {'seed': 1, 'arg': arg}})\n")
    assert load_config(str(path)).data.arg == "none"
    config = load_config(f"{path}:quick", overrides={"data.seed": 5})
    assert (config.data.seed, config.data.arg) == (5, "quick")
    assert load_config(str(path), overrides={"more.deep": "x", "data.seed": "one"}).more.deep == "x"
    with pytest.raises(ValueError, match="'data.seed.low' cannot be set: 'seed' is 1"):
        load_config(str(path), overrides={"data.seed.low": 5})
    with pytest.raises(ValueError, match="'.*absent.py' does not exist"):
        load_config(str(tmp_path / "absent.py"))
    path.write_text("")
    with pytest.raises(ValueError, match="defines no get_config"):
        load_config(str(path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json' is no Python file"):
        load_config(str(tmp_path / "config.json"))
