"""config/remedies.py, config/mistakes.py, cli/typed.py: a mistake is one line with its key and what to write."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab.cli.main import main
from tests.cli.test_main import moe_lab

TEXT = "workload=text"
CHECKPOINT = "model=checkpoint router=native"
EMPTY = ""

# What was typed, its words apart; the key that the line begins with; what it tells to write.
SINGLE = {
    # values of each type
    "batch=abc": ("batch=abc", "a whole number; write batch=2"),
    "batch=1e3": ("batch=1000.0", "write batch=1000"),
    "batch=8.0": ("batch=8.0", "write batch=8"),
    "batch=8.5": ("batch=8.5", "a whole number"),
    "batch=": ("batch=", "write batch=2"),
    "batch=null": ("batch=null", "leave batch out"),
    "batch=true": ("batch=true", "a whole number"),
    "batch=0": ("batch=0", ">= 1"),
    "batch=-1": ("batch=-1", ">= 1"),
    "batch=1k": ("batch=1k", "the number alone, such as batch=1"),
    "batch=[1,8]": ("batch=[1,8]", "write batch=1,8 with -m"),
    "batch=1:8": ("batch=1:8", "write batch=1,8 with -m"),
    "batch=8;": ("batch=8;", "write batch=8"),
    "batch=1,": ("batch=1,", "write batch=1."),
    "batch==2": ("batch==2", "write batch=2"),
    "batch.x=3": ("batch", "write batch=VALUE"),
    "seed=-1": ("seed=-1", ">= 0"),
    "seed=1.5": ("seed=1.5", "a whole number; write seed=0"),
    "model.n_heads=three": ("model.n_heads=three", "write model.n_heads=8"),
    "router.top_k=none": ("router.top_k=none", "a whole number"),
    "measure.target_ci=5%": ("measure.target_ci=5%", "write measure.target_ci=0.05"),
    "measure.max_time_s=1min": ("measure.max_time_s=1min", "such as measure.max_time_s=1"),
    "measure.max_time_s=0": ("measure.max_time_s=0.0", "> 0"),
    "router=sinkhorn router.temperature=hot": ("router.temperature=hot", "a number; write router.temperature=1.0"),
    "router=sinkhorn router.temperature=nan": ("router.temperature=nan", "> 0"),
    "measure.phases=maybe": ("measure.phases=maybe", "true or false"),
    "export.verify=[true]": ("export.verify=[true]", "write export.verify=true"),
    "name=[a,b]": ("name=[a,b]", "one text"),
    "export.dynamic=batch": ("export.dynamic=batch", "write export.dynamic=[batch]"),
    "export.dynamic={a:1}": ("export.dynamic={...}", "a list"),
    "export.opset=latest": ("export.opset=latest", "write export.opset=23"),
    "workload.load=hott": ("workload.load=hott", "Did you mean hot?"),
    "workload.phase=decoding": ("workload.phase=decoding", "Did you mean decode?"),
    "device.name=gpu": ("device.name=gpu", "Did you mean cuda?"),
    "sweep=3": ("sweep=3", "set sweep.KEY=VALUE"),
    "batch=${X}": ("batch", "write the value"),
    # options of groups
    "device=gpu": ("device=gpu", "Write device=cuda"),
    "device=CUDA": ("device=CUDA", "Did you mean cuda?"),
    "device=cuda:1": ("device=cuda:1", "CUDA_VISIBLE_DEVICES=1"),
    "dtype=float16": ("dtype=float16", "Write dtype=fp16"),
    "dtype=bfloat16": ("dtype=bfloat16", "Write dtype=bf16"),
    "dtype=half": ("dtype=half", "Write dtype=fp16"),
    "dtype=torch.float32": ("dtype=torch.float32", "Write dtype=fp32"),
    "execution=cudagraph": ("execution=cudagraph", "Write execution=cuda_graph"),
    "export=onnx": ("export=onnx", "Write export=netron"),
    "router=null": ("router=null", "choose one of base"),
    "router=": ("router=", "choose one of base"),
    "router=None": ("router=None", "choose one of base"),
    "router=Sinkhorn": ("router=Sinkhorn", "Did you mean sinkhorn?"),
    "router=top-p": ("router=top-p", "Did you mean top_p?"),
    "router=sinkhorn,torch": ("router=sinkhorn,torch", "add -m"),
    "router=[torch,sinkhorn]": ("router=[torch,sinkhorn]", "write router=torch,sinkhorn with -m"),
    "router=glob(*)": ("router=glob(*)", "add -m"),
    "batch=range(3,3)": ("batch=range(3,3)", "add -m"),
    "+router=sinkhorn": ("+router=sinkhorn", "write router=sinkhorn"),
    "router@foo=torch": ("router@foo", "write router=OPTION"),
    "model=moe_layer/demo": ("model=moe_layer/demo", "write model=moe_layer"),
    "model=allenai/OLMoE-1B-7B-0924": ("model=allenai/OLMoE-1B-7B-0924", "hf download allenai/OLMoE-1B-7B-0924"),
    "model/shape=demo": ("model/shape", "leave it out"),
    "model=moe_layer model/shape=mixtral": ("model/shape=mixtral", "Did you mean mixtral_8x7b?"),
    "model=moe_layer model.shape=demo": ("model.shape=demo", "write model/shape=demo"),
    "measure.reference_router=foo": ("measure.reference_router=foo", "choose one of base"),
    "experiment=nope": ("experiment=nope", "choose one of"),
    "experiment=": ("experiment=", "leave experiment= out"),
    "debug=nope": ("debug=nope", "choose one of fast"),
    "router=1": ("router=1", "choose one of base"),
    "dtype=32": ("dtype=32", "Did you mean fp32?"),
    "experts=nan": ("experts=nan", "choose one of auto"),
    "router=-inf": ("router=-inf", "choose one of base"),
    "router=1e3": ("router=1e3", "choose one of base"),
    "measure.reference_router=1": ("measure.reference_router=1", "choose one of base"),
    "router=capacity router.inner=sinkhorn": ("router.inner=sinkhorn", "write router@router.inner=sinkhorn"),
    "router=sinkhorn.yaml": ("router=sinkhorn.yaml", "write router=sinkhorn."),
    "router=./sinkhorn": ("router=./sinkhorn", "write router=sinkhorn."),
    "router=conf/router/sinkhorn.yaml": ("router=conf/router/sinkhorn.yaml", "write router=sinkhorn."),
    "model.shape=mine": ("model.shape=mine", "write model/shape=mine"),
    "router=[torch": ("router=[torch", "add ]"),
    "router=torch,batch=2": ("router=torch,batch=2", "apart: router=torch batch=2"),
    # keys
    "batch=???": ("batch=???", "write batch=VALUE"),
    "router=sinkhorn temperature=0.5": ("temperature", "write router.temperature=VALUE"),
    "top_k=2": ("top_k", "write model.top_k=VALUE or router.top_k=VALUE"),
    "+router.temperature=0.5": ("router.temperature", "router has name, impl"),
    "++router.foo=3": ("router.foo", "router has name, impl"),
    "router.top_k=100": ("router.top_k=100", "must be <= 8"),
    "model.tie_embeddings=2": ("model.tie_embeddings=2", "write model.tie_embeddings=true"),
    "seq-len=8": ("seq-len", "Did you mean seq_len?"),
    "Router=sinkhorn": ("Router", "Did you mean router?"),
    "+foo=3": ("foo", "the configuration has model"),
    "+batch=3": ("+batch", "write batch=3"),
    "~batch": ("~batch", "set batch=VALUE"),
    "~router": ("~router", "choose router=OPTION"),
    "~router.temperature": ("~router.temperature", "leave it out"),
    "router.name=x": ("router.name=x", "choose another option"),
    "hydra.foo=3": ("hydra.foo", "hydra has callbacks"),
    "model=minimal seq_len=8": ("seq_len=8", "remove it"),
    "batch=1 batch=2": ("batch=2", "remove one, or write batch=1,2 with -m"),
    "router=torch router=sinkhorn": ("router=sinkhorn", "given twice"),
    "batch.=8": ("batch.=8", "write KEY=VALUE"),
    # paths
    f"{CHECKPOINT} model.path=allenai/OLMoE-1B": ("model.path=allenai/OLMoE-1B", "write model.path=OLMoE-1B"),
    f"{CHECKPOINT} model.path=~/x": ("model.path=~/x", "write model.path=$HOME/x"),
    f"{CHECKPOINT} model.path=nowhere": ("model.path=nowhere", "give the folder"),
    f"{CHECKPOINT} model.path=C:\\Users\\x": ("model.path=C:\\Users\\x", "give the folder"),
    f"{CHECKPOINT} model.path=/data/run=3": ("model.path=/data/run=3", "'model.path=\"/data/run=3\"'"),
    f"{CHECKPOINT} model.path=/data/a[v2]": ("model.path=/data/a[v2]", "in quotes"),
    f"{CHECKPOINT} model.path=null": ("model.path=null", "one text"),
    CHECKPOINT: ("model.path", "set model.path="),
    f"{TEXT} workload.path=nowhere.txt": ("workload.path=nowhere.txt", "give a text file"),
    f"{TEXT} workload.path=*.txt": ("workload.path=*.txt", "no file matches the pattern"),
    f"{TEXT} workload.path=[a.txt,b.txt": ("workload.path=[a.txt,b.txt", "add ]"),
    f"{TEXT} workload.path=[]": ("workload.path=[]", "a list of files"),
    TEXT: ("workload.path", "set workload.path="),
    "workload.load=replay workload.trace=nowhere": ("workload.trace=nowhere", "measure.record_routing=true"),
    "hydra.run.dir=": ("hydra.run.dir=", "write hydra.run.dir=FOLDER"),
    "hydra.run.dir=x/y batch=0": ("batch=0", ">= 1"),
    "--config-dir nowhere": ("--config-dir nowhere", "folder not found"),
    "--config-dir": ("--config-dir/-cd", "expected one argument"),
    "--config-name x": ("--config-name x", "leave out --config-name"),
    # keys of a sweep
    "hydra.sweep.dir=x": ("hydra.sweep.dir=x", "(-m)"),
    "sweep.name=x": ("sweep.name=x", "(-m)"),
    # words that are no override
    "--batch 8": ("--batch", "write batch=8"),
    "--batch=8": ("--batch=8", "write batch=8"),
    "-batch=8": ("-batch=8", "write batch=8"),
    "--seq-len 8": ("--seq-len", "write seq_len=8"),
    "--router": ("--router", "write router=VALUE"),
    "--mulitrun": ("--mulitrun", "Did you mean --multirun?"),
    "-V": ("-V", "Did you mean --version?"),
    "-router sinkhorn": ("-router", "write router=sinkhorn"),
    "-model minimal": ("-model", "write model=minimal"),
    "sweep batch=1,2": ("sweep", "write -m"),
    "help": ("help", "write --help"),
    "--package x": ("--package x", "--cfg"),
    "-h=3": ("--help/-h", "moe-lab --help"),
    "model/moe_layer": ("model/moe_layer", "write model=moe_layer"),
    "router:sinkhorn": ("router:sinkhorn", "write router=sinkhorn"),
    "router = sinkhorn": ("router =", "write router=sinkhorn"),
    "router= sinkhorn": ("sinkhorn", "write router=sinkhorn"),
    "batch=1 sinkhorn": ("sinkhorn", "write router=sinkhorn"),
    "reprot": ("reprot", "Did you mean report?"),
    "batch=1 plan": ("plan", "write moe-lab plan"),
    "=8": ("=8", "write KEY=VALUE"),
    "\u2014m": ("\u2014m", "type -m"),
    "\u2013\u2013multirun": ("\u2013\u2013multirun", "type --multirun"),
    "\u2018batch=1\u2019": ("\u2018batch=1\u2019", "type 'batch=1'"),
    "batch=\u201c1\u201d": ("batch=\u201c1\u201d", "type 'batch=1'"),
}
OF_A_SWEEP = {
    "batch=abc,1": ("batch=abc", "a whole number"),
    "batch=[1,8]": ("batch=[1,8]", "write batch=1,8"),
    "batch=0": ("batch=0", ">= 1"),
    "router=glob(sinkorn*)": ("router=glob(sinkorn*)", "moe-lab list router"),
    "router=glob(*,exclude=*)": ("router=glob(*,exclude=*)", "no value matches"),
    "batch=range(3,3)": ("batch=range(3,3)", "no cell; write batch=A,B"),
    "batch=choice()": ("batch=choice()", "no cell; write batch=A,B"),
    "hydra/launcher=basic router=glob(sinkorn*)": ("router=glob(sinkorn*)", "no cell"),
    "hydra/launcher=basic batch=range(3,3)": ("batch=range(3,3)", "no cell"),
    "hydra/launcher=basic batch=0": ("batch=0", ">= 1"),
    "hydra/launcher=basic batch=1,2 sweep.max_cells=1": ("sweep.max_cells=1", "set sweep.max_cells=2"),
    "hydra/launcher=joblib router=glob(x*)": ("hydra.launcher.n_jobs=-1", "set hydra.launcher.n_jobs=1"),
    "hydra/launcher=slurm": ("hydra/launcher=slurm", "choose one of basic"),
    "router=1,2": ("router=1", "choose one of"),
    "batch=1,,8": ("batch=1,,8", "write batch=1,8"),
    "batch=range(1,8,0)": ("batch=range(1,8,0)", "write batch=A,B"),
    "batch=interval(1,8)": ("batch=interval(1,8)", "write batch=A,B"),
    "sweep.max_cells=0": ("sweep.max_cells=0", ">= 1"),
    "sweep.exclude=[router]": ("sweep.exclude=router", "such as {router: torch}"),
    "hydra.sweeper.params={batch:3}": ("hydra.sweeper.params={batch:3}", "write batch=1,2"),
    "hydra.sweeper.params.batch=1,2": ("hydra.sweeper.params.batch=1,2", "write batch=1,2"),
    "sweep.variants=[{router: torch},{router: native}]": (
        "sweep.variants=[{router: torch},{router: native}]",
        "quote it",
    ),
    "router=torch,null": ("router=null", "choose one of"),
    "~router": ("~router", "choose router=OPTION"),
    f"{CHECKPOINT} model.path=allenai/OLMoE-1B": ("model.path=allenai/OLMoE-1B", "hf download"),
    f"{TEXT} workload.path=*.txt": ("workload.path=*.txt", "no file matches"),
    "sweep.name=../x": ("sweep.name=../x", "hydra.sweep.dir=FOLDER"),
    "sweep.name=": ("sweep.name=", "leave it out"),
    "sweep.stale=redo": ("sweep.stale=redo", "rerun, keep, refuse"),
    "sweep.compare=router": ("sweep.compare=router", "write sweep.compare=[router]"),
    "sweep.compare=[routr]": ("sweep.compare=routr", "Did you mean router?"),
    "sweep.anchor=torch": ("sweep.anchor=torch", "such as {router: torch}"),
    "sweep.timeout_s=-1": ("sweep.timeout_s=-1.0", "> 0"),
    "hydra.run.dir=x": ("hydra.run.dir=x", "hydra.sweep.dir"),
    "batch=1 batch=2": ("batch=2", "given twice"),
    "--batch 8": ("--batch", "write batch=8"),
}
WORDS = {
    "report": ("report", "moe-lab report --help"),
    "report nowhere": ("nowhere", "not found"),
    "report .": (".", "give the folder of a run or a sweep"),
    "report --open x": ("report", "--open"),
    "compare .": ("compare", "required: B"),
    "compare . .": (".", "give the folder of a run or a sweep"),
    "list routr": ("routr", "Did you mean router?"),
    "doctor x": ("doctor", "moe-lab doctor --help"),
    "generate x model.path=nowhere": ("model.path=nowhere", "give the folder"),
    "generate x model.path=allenai/OLMoE-1B": ("model.path=allenai/OLMoE-1B", "hf download"),
    "clean --older-than 3d": ("clean", "--older-than 30"),
    "generate": ("generate", "required: prompt"),
    "export": ("export", "give either RUN_DIR or --verify DIR"),
    "plan reprot": ("reprot", "Did you mean report?"),
    "plan --cfg job": ("plan", "has no effect"),
    "plan --batch 8": ("--batch", "write batch=8"),
    "plan batch=0": ("batch=0", ">= 1"),
    "plan -m batch=range(3,3)": ("batch=range(3,3)", "no cell"),
    "plan \u2014m batch=1": ("\u2014m", "type -m"),
    "plan batch=1 batch=2": ("batch=2", "given twice"),
}
ALL = [
    *((typed, typed.split(), *line) for typed, line in SINGLE.items()),
    *((f"-m {typed}", ["-m", *typed.split()], *line) for typed, line in OF_A_SWEEP.items()),
    *((typed, typed.split(), *line) for typed, line in WORDS.items()),
    ("an empty word", [EMPTY], "''", "write KEY=VALUE"),
    ("spaces around =", ["router = sinkhorn"], "router = sinkhorn", "write router=sinkhorn"),
    ("a folder without a name", ["report", EMPTY], "report", "give a path"),
    ("a path with spaces", ["model.path=/a (copy)"], "model.path=/a (copy)", "in quotes"),
]


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [  # two of three are left to make test-all
        pytest.param(words, key, remedy, id=name, marks=pytest.mark.slow if number % 3 else ())
        for number, (name, words, key, remedy) in enumerate(ALL)
    ],
)
def test_a_mistake_is_one_line_with_its_key_and_remedy(
    words: list[str],
    key: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, nothing on stdout, no folder left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["moe-lab"])
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"moe-lab: [^\n]*\n", err), err
    assert err.startswith((f"moe-lab: {key}:", f"moe-lab: {key} has no value")), err
    assert remedy in err
    assert list(tmp_path.iterdir()) == []


MISSING = (
    "generate x model.path=nowhere",
    "+router.temperature=1",
    "model=checkpoint router=native model.path=nowhere",
    "workload=text workload.path=nowhere.txt",
    "batch=abc",
)


def test_no_torch_is_loaded_to_find_a_mistake(tmp_path: Path) -> None:
    """Of a path that leads nowhere, too; one after the other in one process."""
    program = (
        "import sys; from moe_lab.cli.main import main\n"
        "for words in sys.argv[1:]:\n"
        "    sys.argv[1:] = words.split()\n"
        "    print(main(words.split()), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, *MISSING]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 False\n" * len(MISSING), done.stderr


@pytest.mark.slow
def test_options_may_stand_between_overrides(tmp_path: Path) -> None:
    """Before, behind or between: the same composition, and the same folder of a sweep."""
    orders = (["batch=1", "--cfg", "job", "seq_len=8"], ["--cfg", "job", "batch=1", "seq_len=8"])
    texts = [moe_lab(*words, cwd=tmp_path).stdout for words in orders]
    assert texts[0] == texts[1] and "\nbatch: 1\nseq_len: 8\n" in texts[0]
    help_text = moe_lab("batch=1", "--help", "seq_len=8", cwd=tmp_path).stdout
    assert "\nbatch: 1\nseq_len: 8\n" in help_text


def test_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the package, not Hydra's alone."""
    assert main(["--version"]) == 0
    assert re.fullmatch(r"moe-lab \d\S* \(Hydra \d\S*, torch \d\S*\)\n", capsys.readouterr().out)
