"""The synthetic corpus of egs/mini: phrases of a small grammar, spoken by eSpeak NG."""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

import espeakng_loader
import numpy as np
import soxr

from posinv.augment.draws import generator
from posinv.corpora.prepared import Contents, Prepared, wanted_minutes
from posinv.data.audio import SAMPLING_RATE, write_audio
from posinv.data.directory import DataDir
from posinv.data.files import atomic_folder
from posinv.data.parallel import map_processes
from posinv.errors import InputError

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Voice:
    """A speaker: an eSpeak voice variant at a pitch (0-99) and a rate (words a minute)."""

    speaker: str
    variant: str
    pitch: int
    rate: int


VOICES: dict[str, tuple[Voice, ...]] = {
    "train": (
        Voice("anna", "f1", 45, 138),
        Voice("beth", "f2", 55, 148),
        Voice("cara", "f3", 45, 133),
        Voice("dora", "f5", 60, 153),
        Voice("elsa", "linda", 35, 143),
        Voice("faye", "Annie", 40, 138),
        Voice("gina", "belinda", 25, 135),
        Voice("hank", "m1", 45, 138),
        Voice("ivan", "m2", 55, 148),
        Voice("jack", "m3", 40, 153),
        Voice("kurt", "m4", 60, 143),
        Voice("luke", "m6", 35, 133),
        Voice("mark", "m7", 50, 148),
        Voice("nick", "klatt3", 50, 143),
        Voice("omar", "adam", 65, 138),
        Voice("pete", "Michael", 55, 133),
        Voice("quin", "Alex", 70, 148),
        Voice("rolf", "m8", 60, 140),
    ),
    "dev": (
        Voice("sara", "grandma", 50, 138),
        Voice("theo", "m5", 50, 143),
        Voice("ugur", "robert", 60, 138),
    ),
    "test": (
        Voice("vera", "f4", 50, 138),
        Voice("wanda", "aunty", 50, 148),
        Voice("xaver", "miguel", 50, 138),
        Voice("yuri", "Mike", 60, 148),
    ),
}

_COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown")
_SIZES = ("big", "small", "old", "new")
_THINGS = ("box", "book", "cup", "bag", "key", "ball", "lamp")
_PLACES = ("kitchen", "garden", "office", "school", "park", "station", "house")
_FURNITURE = ("table", "chair", "window", "door")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DAYS = ("today", "tomorrow", "tonight", "on monday", "on friday", "on sunday")
_PEOPLE = ("my mother", "my father", "my sister", "my brother")

# Upper-case names are drawn from _CLASSES; a phrase may have several of one class.
_TEMPLATES = (
    "put the ITEM WHERE",
    "please take the ITEM to the PLACE",
    "bring me the ITEM and the ITEM",
    "please OPEN the COLOUR SHUT WHERE",
    "OPEN the SHUT",
    "OPEN the SHUT WHERE",
    "show me the ITEM",
    "where is PERSON DAY",
    "PERSON will MEET PERSON DAY",
    "DAY PERSON will MEET me at NUMBER",
    "PERSON FOUND the ITEM",
    "DAY PERSON FOUND the ITEM",
    "PERSON FOUND NUMBER keys DAY",
    "put the THING NEAR the FURNITURE DAY",
    "where is the ITEM",
    "is the ITEM WHERE",
    "the ITEM is WHERE",
    "meet me at the PLACE at NUMBER",
    "take the COLOUR FURNITURE to the PLACE",
    "the COLOUR FURNITURE is in the PLACE",
    "the SIZE FURNITURE is COLOUR and SIZE",
    "give PERSON the ITEM",
    "call NUMBER NUMBER NUMBER NUMBER NUMBER",
    "please MEET PERSON at NUMBER DAY",
)
_CLASSES = {
    "COLOUR": _COLOURS,
    "SIZE": _SIZES,
    "THING": _THINGS,
    "PLACE": _PLACES,
    "NUMBER": _NUMBERS,
    "DAY": _DAYS,
    "PERSON": _PEOPLE,
    "OPEN": ("open", "close"),
    "SHUT": ("box", "bag", "door", "window"),
    "MEET": ("meet", "see", "call"),
    "FOUND": ("found", "lost", "saw"),
    "ITEM": ("COLOUR THING", "SIZE THING", "SIZE COLOUR THING", "THING NUMBER"),
    "WHERE": ("NEAR the FURNITURE", "NEAR the FURNITURE", "in the PLACE", "near the PLACE"),
    "NEAR": ("on", "under", "near"),
    "FURNITURE": _FURNITURE,
}
_MAX_WORDS = 8
_MIN_QUERY_PHONES = 4

# eSpeak's phoneme mnemonics for en-us, as ARPAbet.
_ARPABET = {
    **{name: name.upper() for name in "pbtdkgfvszmnlrw"},
    **{"h": "HH", "j": "Y", "tS": "CH", "dZ": "JH", "T": "TH", "D": "DH", "S": "SH", "Z": "ZH"},
    **{"N": "NG", "t#": "T", "r-": "R", "i:": "IY", "i": "IY", "I": "IH", "I2": "IH"},
    **{"E": "EH", "a": "AE", "0": "AA", "A:": "AA", "O:": "AO", "O2": "AO", "U": "UH"},
    **{"u:": "UW", "V": "AH", "@": "AH", "@2": "AH", "a#": "AH", "3": "ER", "3:": "ER"},
    **{"eI": "EY", "aI": "AY", "OI": "OY", "oU": "OW", "aU": "AW", "@L": "AH L"},
    **{"i@3": "IH R", "e@": "EH R", "A@": "AA R", "o@": "AO R", "O@": "AO R", "U@": "UH R"},
}


def sentence(rng: np.random.Generator) -> str:
    """Draw a phrase of 3 to 8 lower-case words."""
    while True:
        words = str(rng.choice(_TEMPLATES)).split()
        while any(word in _CLASSES for word in words):
            words = [
                part
                for word in words
                for part in (
                    str(rng.choice(_CLASSES[word])).split() if word in _CLASSES else [word]
                )
            ]
        if len(words) <= _MAX_WORDS:
            return " ".join(words)


def split_of(text: str) -> str:
    """Return the one split that a phrase may occur in: a function of its words alone."""
    bucket = blake2b(text.encode(), digest_size=1).digest()[0] % 10
    return {0: "dev", 1: "test", 2: "test"}.get(bucket, "train")


def prepare(
    out: Path | str,
    *,
    minutes: float = 20.0,
    dev_minutes: float = 1.5,
    test_minutes: float = 2.0,
    phrases: int = 1,
    seed: int = 0,
    nj: int = 1,
) -> Prepared:
    """Write ``out/train``, ``out/dev``, ``out/test`` and ``out/test_queries``, all or none.

    Voices and phrases are disjoint between the first three; phonemes are what eSpeak itself says
    for the phrase. An utterance is a function of its id and the seed alone. The queries, for
    query-by-example search, are words of the test set of 4 phonemes at least, each spoken alone by
    one of its voices; without words that all of its utterances have.

    Args:
        out: parent of the data directories; earlier ones are replaced.
        minutes: of training speech, at least.
        dev_minutes: of development speech, at least.
        test_minutes: of test speech, at least.
        phrases: in an utterance, which takes 2 to 3 s for each; there are pauses between them.
        seed: of phrases, silences, levels and small changes of rate and pitch.
        nj: number of processes.

    Raises:
        InputError: minutes not above zero, or ``phrases`` or ``nj`` below 1.
    """
    wanted = wanted_minutes(minutes, dev_minutes, test_minutes, limit=1000)
    if nj < 1:
        raise InputError(f"--nj {nj}: at least 1 process is needed")
    if phrases < 1:
        raise InputError(f"--phrases {phrases}: an utterance has at least 1 phrase")
    out = Path(out)
    made = {}
    with ExitStack() as stack:

        def folder(name: str) -> "_Folder":
            fresh = stack.enter_context(atomic_folder(out / name, replaces="wav.scp"))
            return _Folder(fresh, out / name)

        for split, value in wanted.items():
            jobs = _plan(split, seed, phrases)
            data, made[out / split] = _prepare_split(jobs, folder(split), value, nj)
        queries = out / "test_queries"
        made[queries] = _prepare_queries(data.text, folder("test_queries"), seed, nj)
    return Prepared(made)


class _Folder:
    """A data directory that is being written."""

    def __init__(self, fresh: Path, final: Path) -> None:
        self.fresh, self.final = fresh, final
        self.samples = 0
        self.data = DataDir({}, {}, {}, {}, {})
        (fresh / "audio").mkdir()

    def add(self, job: "_Job", x: np.ndarray, phones: str) -> None:
        write_audio(self.fresh / "audio" / f"{job.utt}.flac", x, SAMPLING_RATE)
        entry = str(self.final / "audio" / f"{job.utt}.flac")
        self.data.wav[job.utt] = self.data.spk1[job.utt] = entry
        self.data.text[job.utt], self.data.phn[job.utt] = job.text, phones
        self.data.utt2spk[job.utt] = job.voice.speaker
        self.samples += len(x)

    def finish(self) -> tuple[DataDir, Contents]:
        self.data.write(self.fresh)
        return self.data, Contents.of(self.data, self.samples / 60 / SAMPLING_RATE)


def _prepare_split(
    jobs: Iterator["_Job"], folder: _Folder, minutes: float, nj: int
) -> tuple[DataDir, Contents]:
    while folder.samples < minutes * 60 * SAMPLING_RATE:
        # zip also takes a 17th job, which is lost. To keep it would make another corpus than the
        # one that the results in egs/ are of.
        batch = [job for job, _ in zip(jobs, range(16), strict=False)]
        for spoken in _speak_all(_speak, batch, nj):
            if folder.samples >= minutes * 60 * SAMPLING_RATE:
                break
            folder.add(*spoken)
    return folder.finish()


def _prepare_queries(text: dict[str, str], folder: _Folder, seed: int, nj: int) -> Contents:
    spoken = [set(words.split()) for words in text.values()]
    voices = VOICES["test"]
    jobs = []
    for word in sorted({word for words in spoken for word in words}):
        if all(word in words for words in spoken):
            continue
        voice = voices[blake2b(word.encode(), digest_size=1).digest()[0] % len(voices)]
        jobs.append(_Job(f"{voice.speaker}-query-{word}", (word,), voice, seed))
    for job, x, phones in _speak_all(_speak_alone, jobs, nj):
        if len(phones.split()) >= _MIN_QUERY_PHONES:
            folder.add(job, x, phones)
    return folder.finish()[1]


type _Speech = tuple[np.ndarray, str]  # samples (T,), phonemes


def _speak_all(
    speak: Callable[["_Job"], _Speech], jobs: Iterable["_Job"], nj: int
) -> Iterator[tuple["_Job", np.ndarray, str]]:
    # eSpeak's noise and flutter go on from one utterance to the next, even when it is
    # initialised anew: each utterance gets a process of its own.
    return map_processes(lambda job: (job, *speak(job)), jobs, nj)


@dataclass(frozen=True)
class _Job:
    utt: str
    phrases: tuple[str, ...]
    voice: Voice
    seed: int

    @property
    def text(self) -> str:
        return " ".join(self.phrases)


def _plan(split: str, seed: int, phrases: int) -> Iterator[_Job]:
    # Round after round over the voices; no phrase twice in a split.
    said = set()
    rng = generator(seed, split)

    def new_phrase() -> str:
        text = sentence(rng)
        while text in said or split_of(text) != split:
            text = sentence(rng)
        said.add(text)
        return text

    for number in count():
        for voice in VOICES[split]:
            texts = tuple(new_phrase() for _ in range(phrases))
            yield _Job(f"{voice.speaker}-{number:04d}", texts, voice, seed)


def _speak(job: _Job) -> _Speech:
    espeak, rng = _ESpeak(), generator(job.seed, job.utt)
    parts, phones = [], []
    for phrase in job.phrases:
        x, of_phrase = _say(espeak, phrase, job.voice, rng)
        front, back = (round(rng.uniform(0.05, 0.25) * SAMPLING_RATE) for _ in range(2))
        parts.append(np.pad(x, (front, back)))
        phones.append(of_phrase)
    return _add_floor(np.concatenate(parts), rng), " ".join(phones)


def _speak_alone(job: _Job) -> _Speech:
    """Speak without silence before and after."""
    rng = generator(job.seed, job.utt)
    x, phones = _say(_ESpeak(), job.text, job.voice, rng)
    loud = np.flatnonzero(np.abs(x) > 0.02 * np.abs(x).max())
    return _add_floor(x[loud[0] : loud[-1] + 1], rng), phones


def _add_floor(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return x + 1e-4 * rng.standard_normal(len(x))  # -80 dB


def _say(espeak: "_ESpeak", text: str, voice: Voice, rng: np.random.Generator) -> _Speech:
    rate = round(voice.rate * rng.uniform(0.95, 1.05))
    pitch = round(np.clip(voice.pitch + rng.uniform(-3, 3), 0, 99))
    noise_seed = int(rng.integers(2**31))
    x, espeak_rate, phones = espeak.say(text, voice.variant, pitch, rate, noise_seed)
    x = soxr.resample(x / 32768, espeak_rate, SAMPLING_RATE)
    x *= 10 ** (rng.uniform(-29, -23) / 20) / np.sqrt(np.mean(x**2))
    x *= min(1.0, 0.95 / np.abs(x).max())
    return x, phones


class _ESpeak:
    """eSpeak NG's shared library in this process, for one utterance."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self.lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
        data = str(espeakng_loader.get_data_path()).encode()
        self.rate = self.lib.espeak_Initialize(2, 0, data, 0)  # AUDIO_OUTPUT_SYNCHRONOUS
        if self.rate <= 0:
            raise InputError("espeakng-loader: eSpeak NG doesn't start: install it again")

    def say(
        self, text: str, variant: str, pitch: int, rate: int, seed: int
    ) -> tuple[np.ndarray, int, str]:
        """Return int16 samples ``(T,)``, their rate and the phonemes."""
        chunks = []

        @ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        def collect(wave: Any, num_samples: int, _events: object) -> int:
            if wave and num_samples:
                chunks.append(ctypes.string_at(wave, 2 * num_samples))
            return 0

        self.lib.espeak_SetSynthCallback(collect)
        _succeed(self.lib.espeak_SetVoiceByName(f"en-us+{variant}".encode()), variant)
        # espeakRATE, espeakVOLUME (below clipping), espeakPITCH
        for parameter, value in ((1, rate), (2, 60), (3, pitch)):
            _succeed(self.lib.espeak_SetParameter(parameter, value, 0), variant)
        self.lib.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        spoken = text.encode()
        utf8 = 1
        _succeed(self.lib.espeak_Synth(spoken, len(spoken) + 1, 0, 1, 0, utf8, None, None), variant)
        phones = self._phonemes(spoken)
        return np.frombuffer(b"".join(chunks), np.int16), self.rate, phones

    def _phonemes(self, text: bytes) -> str:
        position = ctypes.c_char_p(text)
        clauses = []
        while position.value:
            separated = ord("_") << 8
            clauses.append(
                self.lib.espeak_TextToPhonemes(ctypes.byref(position), 1, separated).decode()
            )
        return to_arpabet(" ".join(clauses))


def _succeed(status: int, variant: str) -> None:
    if status:
        raise InputError(f"eSpeak NG: status {status} with voice {variant}: install it again")


def to_arpabet(mnemonics: str) -> str:
    """Turn eSpeak's mnemonics (``_`` and spaces between) into ARPAbet without stress.

    An R after a vowel that ends in one (linking R) is dropped.
    """
    phones: list[str] = []
    for mnemonic in mnemonics.replace("_", " ").split():
        bare = mnemonic.strip("',%=;|")
        if bare in ("", ":"):  # a mark alone; a pause
            continue
        for phone in _ARPABET[bare].split():
            if phone == "R" and phones and phones[-1] in ("R", "ER"):
                continue
            phones.append(phone)
    return " ".join(phones)
