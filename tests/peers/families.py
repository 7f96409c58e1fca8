"""Which families of models are tried, and where their tests stand."""

from dataclasses import dataclass

# Small models of timm whose attention a host reaches: plain, with positions in scores or in q and k, and in stages.
_PLAIN = (
    "test_vit", "test_vit4", "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "vit_small_patch14_dinov2",
    "flexivit_small", "deit_tiny_distilled_patch16_224",
)  # fmt: skip
_POSITIONS = (
    "vit_relpos_small_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "beit_base_patch16_224",
    "naflexvit_base_patch16_gap",
)  # fmt: skip
_STAGES = (
    "cait_xxs24_224", "xcit_nano_12_p16_224", "volo_d1_224", "twins_svt_small", "crossvit_tiny_240", "mvitv2_tiny",
    "pit_ti_224", "pvt_v2_b0", "nest_tiny", "hiera_tiny_224", "tiny_vit_5m_224", "mobilevit_xxs", "vitamin_small_224",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Models whose tests are run together.

    Attributes:
        name: What a user asks for.
        library: Whose they are, and whose tests run: "transformers" or "timm".
        file: The file of tests, from the folder that holds `tests`.
        cases: The small models that stand in where the distribution leaves that file out (see `inside/peers_suite.py`).
        models: Values of `model_name` whose tests are run; all of the file's tests by default.
    """

    name: str
    library: str
    file: str
    cases: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


def _family(name: str, *cases: str) -> Family:
    return Family(name, "transformers", f"tests/models/{name}/test_modeling_{name}.py", cases or (name,))


FAMILIES = {
    family.name: family
    for family in (
        _family("bert"),
        _family("roberta"),
        _family("modernbert"),
        _family("vit"),
        _family("dinov2"),
        _family("clip", "clip", "clip_text", "clip_vision"),
        _family("bart"),
        _family("t5", "t5", "t5_encoder"),
        _family("gpt2"),
        _family("llama"),
        _family("qwen3"),
        _family("mistral"),
        _family("opt"),
        _family("whisper"),
        _family("gemma3", "gemma3_text", "gemma3"),
        Family("timm_plain", "timm", "tests/test_models.py", models=_PLAIN),
        Family("timm_positions", "timm", "tests/test_models.py", models=_POSITIONS),
        Family("timm_stages", "timm", "tests/test_models.py", models=_STAGES),
    )
}
