//! How workgroups of products are cut, measured on the card: which number of threads and of outputs is the fastest
//! depends on its caches, registers and scheduler, and on nothing that could be asked for.
//!
//! Before a model is warm, its matrices are sorted into classes (form, inputs, outputs, columns). For each class the
//! cuts that the card can run are compiled, their results are compared with those of the usual cut, and they are timed
//! on the model's own weights. The usual cut stays unless another is clearly faster. All that takes [`BUDGET`] at most;
//! what there was no time for stays usual. The outcome is kept in a file ([`file`]), so that later starts only read.
//!
//! CubeCL's own tuner is not used: it chooses while requests run, and says nothing of its choices, which belong into
//! the numerics class, as the order of sums depends on them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use super::decoder::Decoder;
use super::forms::Form;
use super::kernels::Cut;
use super::matrix::{COLUMNS, Piece, Target};
use super::{Buffer, Card};

mod file;
#[cfg(test)]
mod tests;

use file::{Lock, Store};

/// Time for a model's classes altogether.
pub(super) const BUDGET: Duration = Duration::from_secs(20);
/// How long an engine waits for another that measures on the same card: what that takes, and a compiler's last kernel.
const WAIT: Duration = Duration::from_secs(30);
/// Kinds of matrices (form, inputs, outputs) that are measured; real models have some five.
const MOST_KINDS: usize = 32;
/// Bytes of weights that one measurement reads, about; what is much less stays in caches as it does in no step.
const SWEEP: u64 = 256 << 20;
/// Products of one measurement at most, and about how long it may take: on a slow card it is fewer.
const LAUNCHES: u64 = 32;
const LONG: Duration = Duration::from_millis(20);
/// Measurements of which the fastest counts.
const ROUNDS: usize = 3;
/// The part of the usual cut's time below which another is clearly faster.
const CLEARLY: f64 = 0.97;
/// So many times as slow as the fastest is out of the question.
const MUCH: f64 = 1.5;
/// The difference of two cuts' results, as a part of the largest one, above which one of them is wrong.
const TOLERANCE: f32 = 1e-3;

/// What has a best cut of its own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Class {
    form: String,
    inputs: u32,
    /// The next power of two.
    outputs: u32,
    columns: u32,
}

type Cuts = BTreeMap<Class, Cut>;

/// Where a plan comes from.
#[derive(Debug, PartialEq)]
enum Source {
    File,
    /// So many classes were measured, of which so many got another cut; the rest had no time.
    Measured {
        classes: usize,
        changed: usize,
        left: usize,
    },
    /// There was no place to keep an outcome, or others were measuring for too long.
    Nothing,
}

/// Matrices of one form and size.
struct Kind<'a> {
    form: Form,
    inputs: usize,
    outputs: usize,
    pieces: Vec<&'a Piece>,
    bytes: u64,
}

impl Class {
    fn of(form: Form, inputs: usize, outputs: usize, columns: usize) -> Self {
        let outputs = outputs.next_power_of_two() as u32;
        Self { form: form.name(), inputs: inputs as u32, outputs, columns: columns as u32 }
    }
}

impl Card {
    /// What it can run.
    fn cuts(&self, columns: usize) -> impl Iterator<Item = Cut> {
        let hardware = &self.client.properties().hardware;
        let threads = hardware.max_units_per_cube.min(hardware.max_cube_dim.0);
        Cut::all(columns, hardware.max_shared_memory_size, threads)
    }
}

impl Decoder {
    /// A short word for how its kernels are cut, as a part of the numerics class.
    pub fn tuning(&self) -> String {
        let mut used = BTreeSet::new();
        for piece in self.matrices().flat_map(|matrix| matrix.pieces()) {
            let class = |columns| Class::of(piece.form, piece.inputs, piece.outputs, columns);
            used.extend(COLUMNS.into_iter().map(class).zip(piece.cuts));
        }
        format!("t{:08x}", hash(format!("{used:?}").as_bytes()) as u32)
    }
}

/// Gives the decoder's matrices the cuts that are best on its card: those that `folder` knows, else what is measured
/// within the budget. Nothing that goes wrong here keeps a model from being used.
pub(super) fn tune(decoder: &mut Decoder, folder: &Path, budget: Duration) {
    let card = decoder.card().clone();
    let pieces: Vec<&Piece> = decoder.matrices().flat_map(|matrix| matrix.pieces()).collect();
    let (cuts, _) = plan(&card, &pieces, folder, budget);
    for piece in decoder.matrices_mut().flat_map(|matrix| matrix.pieces_mut()) {
        apply(piece, &cuts);
    }
}

fn apply(piece: &mut Piece, cuts: &Cuts) {
    let class = |columns| Class::of(piece.form, piece.inputs, piece.outputs, columns);
    let cut = |columns| cuts.get(&class(columns)).copied().unwrap_or(Cut::usual(columns));
    piece.cuts = COLUMNS.map(cut);
}

/// The best cuts for some pieces.
fn plan(card: &Card, pieces: &[&Piece], folder: &Path, budget: Duration) -> (Cuts, Source) {
    let started = Instant::now();
    let kinds = kinds(pieces);
    let wanted: Vec<Class> = classes(&kinds).map(|(_, class)| class).collect();
    let store = Store::new(folder, card);
    let of_file = || store.read(card).filter(|kept| wanted.iter().all(|class| kept.contains_key(class)));
    let read = |cuts: Cuts| {
        let changed = changed(&wanted, &cuts);
        tracing::info!(file = %store.path.display(), classes = wanted.len(), changed, "kernels are tuned as kept");
        (cuts, Source::File)
    };
    if let Some(cuts) = of_file() {
        return read(cuts);
    }
    // Two that measure at once would measure each other; who waited finds the other's outcome.
    let _lock = match store.lock(WAIT) {
        Lock::Held(lock) => lock,
        Lock::Cannot(why) => {
            tracing::warn!(folder = %folder.display(), %why, "nothing is kept here: kernels are not tuned to the card");
            return (Cuts::new(), Source::Nothing);
        }
        Lock::Busy => {
            tracing::warn!(card = card.name, "another engine still tunes this card: kernels stay as they are");
            return (Cuts::new(), Source::Nothing);
        }
    };
    if let Some(cuts) = of_file() {
        return read(cuts);
    }
    let mut cuts = store.read(card).unwrap_or_default();
    let missing = wanted.iter().filter(|class| !cuts.contains_key(class)).count();
    tracing::info!(card = card.name, classes = missing, at_most = ?budget, "kernels are tuned to the card");
    let deadline = Instant::now() + budget;
    let mut left = 0;
    for (kind, class) in classes(&kinds) {
        if cuts.contains_key(&class) {
            continue;
        }
        let columns = class.columns as usize;
        let best = if Instant::now() < deadline {
            fastest(card, kind, columns, deadline)
        } else {
            left += 1;
            Cut::usual(columns)
        };
        // Also what there was no time for: the next start is to be quick.
        cuts.insert(class, best);
    }
    let changed = changed(&wanted, &cuts);
    let seconds = started.elapsed().as_secs_f32();
    tracing::info!(card = card.name, seconds, classes = missing, changed, left, "kernels were tuned to the card");
    if let Err(why) = store.write(&cuts, &wanted) {
        tracing::warn!(file = %store.path.display(), %why, "what was measured on the card is not kept");
    }
    (cuts, Source::Measured { classes: missing - left, changed, left })
}

/// How many of them have another cut than usual.
fn changed(wanted: &[Class], cuts: &Cuts) -> usize {
    wanted.iter().filter(|class| cuts.get(class) != Some(&Cut::usual(class.columns as usize))).count()
}

/// The pieces by form and size, those with the most weights first.
fn kinds<'a>(pieces: &[&'a Piece]) -> Vec<Kind<'a>> {
    let mut kinds: BTreeMap<Class, Kind<'a>> = BTreeMap::new();
    for piece in pieces.iter().filter(|piece| piece.outputs > 0) {
        let (form, inputs, outputs) = (piece.form, piece.inputs, piece.outputs);
        let kind = kinds.entry(Class::of(form, inputs, outputs, 0));
        let kind = kind.or_insert_with(|| Kind { form, inputs, outputs, pieces: Vec::new(), bytes: 0 });
        kind.bytes += piece.bytes();
        kind.pieces.push(piece);
    }
    let mut kinds: Vec<Kind<'a>> = kinds.into_values().collect();
    kinds.sort_by_key(|kind| std::cmp::Reverse(kind.bytes));
    kinds.truncate(MOST_KINDS);
    kinds
}

/// In the order in which they are measured: first what the answer of a single sequence takes.
fn classes<'a>(kinds: &'a [Kind<'a>]) -> impl Iterator<Item = (&'a Kind<'a>, Class)> {
    let of = |columns| kinds.iter().map(move |kind| (kind, Class::of(kind.form, kind.inputs, kind.outputs, columns)));
    COLUMNS.into_iter().flat_map(of)
}

/// The cut to use: what [`choose`] makes of all that could be measured.
fn fastest(card: &Card, kind: &Kind<'_>, columns: usize, deadline: Instant) -> Cut {
    let usual = Cut::usual(columns);
    let mut bench = Bench::new(card, kind, columns, deadline);
    let (due, of_usual) = match bench.begin(usual) {
        Ok((due, seconds)) if due.iter().all(|value| value.is_finite()) => (due, seconds),
        // The warm-up will say what is wrong.
        _ => return usual,
    };
    let (mut measured, mut least) = (vec![(usual, of_usual)], of_usual);
    for cut in card.cuts(columns).filter(|cut| *cut != usual) {
        if Instant::now() >= deadline {
            break;
        }
        match bench.try_out(cut, &due, least) {
            Ok(seconds) => {
                least = least.min(seconds);
                measured.push((cut, seconds));
            }
            Err(why) => tracing::warn!(?cut, form = kind.form.name(), columns, why, "a kernel is left out"),
        }
    }
    // Clocks rise under load: the usual one, which came first, gets another chance.
    if measured.len() > 1 {
        measured[0].1 = of_usual.min(bench.seconds(usual, f64::INFINITY).unwrap_or(of_usual));
    }
    let (cut, seconds) = choose(&measured);
    let gain = 1.0 - seconds / measured[0].1;
    tracing::debug!(?cut, form = kind.form.name(), kind.inputs, kind.outputs, columns, gain, "the fastest kernel");
    cut
}

/// The first, and so the usual one if it can be, that no other is clearly faster than: chance decides less than among
/// the fastest, so that two cards of one make rather come to the same, and are of one numerics class.
fn choose(measured: &[(Cut, f64)]) -> (Cut, f64) {
    let least = measured.iter().fold(f64::INFINITY, |least, (_, seconds)| least.min(*seconds));
    *measured.iter().find(|(_, seconds)| seconds * CLEARLY <= least).unwrap_or(&measured[0])
}

/// What a class is measured with.
struct Bench<'a> {
    card: &'a Card,
    pieces: &'a [&'a Piece],
    columns: usize,
    x: Buffer,
    /// Room for what the largest piece gives.
    out: Buffer,
    launches: usize,
    /// Behind it nothing is measured twice.
    deadline: Instant,
}

impl<'a> Bench<'a> {
    fn new(card: &'a Card, kind: &'a Kind<'_>, columns: usize, deadline: Instant) -> Self {
        // Any numbers from -1 to 1.
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
        };
        let x: Vec<f32> = (0..columns * kind.inputs).map(|_| next()).collect();
        let widest = kind.pieces.iter().map(|piece| piece.outputs).max().unwrap_or(0);
        let each = (kind.bytes / kind.pieces.len().max(1) as u64).max(1);
        let launches = (SWEEP / each).clamp(4, LAUNCHES) as usize;
        let (x, out) = (card.floats(&x), card.room(columns * widest));
        Self { card, pieces: &kind.pieces, columns, x, out, launches, deadline }
    }

    /// The usual cut's results and seconds. How fast it is says how many launches a measurement has time for.
    fn begin(&mut self, usual: Cut) -> Result<(Vec<f32>, f64), String> {
        let due = self.results(usual)?;
        let wanted = std::mem::replace(&mut self.launches, 1);
        let one = self.seconds(usual, f64::INFINITY)?;
        self.launches = ((LONG.as_secs_f64() / one.max(1e-9)) as usize).clamp(1, wanted);
        Ok((due, self.seconds(usual, f64::INFINITY)?))
    }

    fn launch(&self, piece: &Piece, out: &Buffer, cut: Cut) {
        let target = Target { out, width: piece.outputs, first: 0, bias: None, add: false };
        piece.few(self.card, &self.x, self.columns, target, cut);
    }

    /// The products with the first piece; no numbers where nothing was written. A kernel that does not compile is an
    /// error of what it should have written, so that is a buffer of its own.
    fn results(&self, cut: Cut) -> Result<Vec<f32>, String> {
        let piece = self.pieces[0];
        let out = self.card.floats(&vec![f32::NAN; piece.outputs * self.columns]);
        self.launch(piece, &out, cut);
        self.card.read(&out)
    }

    /// Its seconds, if its results are those that are due.
    fn try_out(&self, cut: Cut, due: &[f32], least: f64) -> Result<f64, String> {
        if !agree(&self.results(cut)?, due) {
            return Err("its results are others".into());
        }
        self.seconds(cut, least)
    }

    /// Seconds that some launches take, one piece after the other as in a step. `least`: the fastest so far, on which
    /// one that is much slower need not be measured again.
    fn seconds(&self, cut: Cut, least: f64) -> Result<f64, String> {
        let mut best = f64::INFINITY;
        for _ in 0..ROUNDS {
            self.card.sync()?;
            let started = Instant::now();
            for piece in self.pieces.iter().cycle().take(self.launches) {
                self.launch(piece, &self.out, cut);
            }
            self.card.sync()?;
            best = best.min(started.elapsed().as_secs_f64());
            if best > least * MUCH || Instant::now() >= self.deadline {
                break;
            }
        }
        Ok(best)
    }
}

/// Whether two cuts' results are the same but for the order of their sums.
fn agree(results: &[f32], due: &[f32]) -> bool {
    let most = due.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    results.len() == due.len() && results.iter().zip(due).all(|(a, b)| (a - b).abs() <= TOLERANCE * most)
}

/// FNV-1a: it tells names and plans apart, and guards against nobody.
fn hash(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}
