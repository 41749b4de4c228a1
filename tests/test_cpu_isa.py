"""Instruction sets: what the CPU is found to have, what may be asked for, and that all give the same results."""

import pytest
from effc.codegen.cpu import host_target, target
from effc.compiler.errors import InputError

AVX2 = "avx2 fma f16c bmi1 bmi2 popcnt"
AVX512 = AVX2 + " avx512f avx512bw avx512dq avx512vl"


@pytest.fixture
def cpu(monkeypatch):
    """A CPU of the test's choice: machine and the words of /proc/cpuinfo."""

    def choose(machine, words):
        monkeypatch.delenv("EFFC_ISA", raising=False)
        monkeypatch.setattr(target.platform, "machine", lambda: machine)
        monkeypatch.setattr(target, "cpu_features", lambda: frozenset(words.split()))

    return choose


@pytest.mark.parametrize(
    ("machine", "words", "name"),
    [
        ("x86_64", AVX512 + " avx512_vnni avx512_bf16 avx_vnni", "avx512+avx512_vnni+avx512_bf16"),
        ("x86_64", AVX512 + " avx512_vnni", "avx512+avx512_vnni"),
        ("x86_64", AVX512, "avx512"),
        ("x86_64", AVX2 + " avx_vnni", "avx2+avx_vnni"),
        ("x86_64", AVX512.replace("avx512bw ", ""), "avx2"),
        ("x86_64", AVX2.replace("f16c ", ""), "generic"),
        ("x86_64", "", "generic"),
        ("aarch64", "fp asimd asimdhp asimddp bf16", "generic"),
        ("arm64", "", "generic"),
        ("riscv64", AVX2, "generic"),
    ],
)
def test_a_cpu_is_used_for_all_that_it_has(cpu, machine, words, name):
    cpu(machine, words)
    found = host_target()
    assert found.name == name
    assert found == host_target(name)
    assert not any("native" in flag or "fast-math" in flag for flag in found.flags)
    if machine != "x86_64":
        assert not any(flag.startswith("-m") for flag in found.flags)


def test_flags_spell_out_every_feature(cpu):
    cpu("x86_64", AVX512 + " avx512_vnni avx512_bf16")
    assert {"-mavx2", "-mbmi", "-mf16c", "-mavx512vl", "-mavx512vnni", "-mavx512bf16"} < set(host_target().flags)
    plain, generic = host_target("avx512"), host_target("generic")
    assert not any("vnni" in flag or "bf16" in flag for flag in plain.flags)
    assert not any(flag.startswith("-m") for flag in generic.flags)
    assert (plain.lanes, host_target("avx2").lanes, generic.lanes) == (16, 8, 4)


def test_environment_asks_for_exactly_what_it_says(cpu, monkeypatch):
    cpu("x86_64", AVX512 + " avx512_vnni avx512_bf16")
    monkeypatch.setenv("EFFC_ISA", "avx512+avx512_bf16")
    assert host_target().features == ("avx512_bf16",)
    monkeypatch.setenv("EFFC_ISA", "avx512")
    assert host_target().features == ()
    assert target.available_isas() == ["avx512+avx512_vnni+avx512_bf16", "avx512", "avx2", "generic"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("sse9", "unknown instruction set 'sse9': expected one of avx512, avx2, generic"),
        ("avx2+sse9", "unknown feature 'sse9' of instruction set avx2: expected one of avx_vnni"),
        ("generic+avx_vnni", "unknown feature 'avx_vnni' of instruction set generic: expected one of none"),
        ("avx512", r"avx512 is more than this CPU has \(avx2\)"),
        ("avx2+avx_vnni", r"avx2\+avx_vnni is more than this CPU has \(avx2\)"),
    ],
)
def test_what_is_unknown_or_missing_is_refused(cpu, asked, message):
    cpu("x86_64", AVX2)
    with pytest.raises(InputError, match=message) as error:
        host_target(asked)
    assert "\n" not in str(error.value)


def test_this_machine(isa):
    assert host_target().name == isa
