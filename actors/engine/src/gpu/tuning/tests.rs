//! Tuning on whatever adapter there is, on tiny matrices: which cut is the fastest there says nothing, but that every
//! cut computes the same, and that what was chosen is used, kept and found again.

use std::time::Duration;

use super::super::matrix::Matrix;
use super::super::tests::{card, floats, matrix, sum_and_size};
use super::*;
use crate::dequantize::Format;
use crate::device::{Place, Placement};
use crate::gguf::Gguf;
use crate::gguf::tiny::{Sizes, llama};
use crate::model::Model;
use crate::{ModelOptions, PackedCache, StepEngine, StepEntry};

/// No multiple of any cut's outputs.
const OUTPUTS: usize = 131;

fn on_card(card: &Card, format: Format, inputs: usize) -> (Matrix, Vec<f32>) {
    let (gguf, weights, part) = matrix(format, inputs, OUTPUTS);
    (Matrix::load(card, &gguf, &[part], None).unwrap(), weights)
}

fn products(card: &Card, matrix: &Matrix, x: &[f32], columns: usize) -> Vec<f32> {
    let out = card.floats(&vec![f32::NAN; columns * OUTPUTS]);
    matrix.apply(card, &card.floats(x), columns, &out, false);
    card.read(&out).unwrap()
}

fn cut_all(matrix: &mut Matrix, cut: Cut) {
    matrix.pieces_mut().iter_mut().for_each(|piece| piece.cuts = [cut; COLUMNS.len()]);
}

/// What the file of a card says of `matrix` becomes what it computes with.
fn planned(card: &Card, matrix: &mut Matrix, folder: &Path, budget: Duration) -> (Cuts, Source) {
    let (cuts, source) = plan(card, &matrix.pieces().iter().collect::<Vec<_>>(), folder, budget);
    matrix.pieces_mut().iter_mut().for_each(|piece| apply(piece, &cuts));
    (cuts, source)
}

#[test]
fn every_cut_gives_the_products_of_plain_arithmetic_on_a_gpu() {
    let Some(card) = card() else { return };
    for (format, inputs) in [(Format::Q4K, 768), (Format::F16, 88)] {
        let (mut matrix, weights) = on_card(&card, format, inputs);
        let mut tried = 0;
        for columns in COLUMNS {
            let x = floats(columns as u64, columns * inputs);
            for cut in card.cuts(columns) {
                cut_all(&mut matrix, cut);
                let got = products(&card, &matrix, &x, columns);
                for (n, got) in got.into_iter().enumerate() {
                    let (row, output) = (n / OUTPUTS, n % OUTPUTS);
                    let (sum, size) = sum_and_size(&weights[output * inputs..][..inputs], &x[row * inputs..][..inputs]);
                    let bound = 2.0 * (inputs as f64 + 8.0) * 2f64.powi(-24) * (size + 2.0);
                    let error = (f64::from(got) - sum).abs();
                    assert!(error <= bound, "{cut:?} of {columns}, row {row}, output {output}: {got} is not {sum}");
                }
                tried += 1;
            }
            assert!(card.cuts(columns).any(|cut| cut == Cut::usual(columns)), "{columns}");
        }
        println!("{}: {tried} kernels are right", format.name());
        assert!(tried >= 30, "{tried}");
    }
}

/// The whole of it: measured, kept, read by the next, used by products.
#[test]
fn what_a_gpu_is_tuned_to_is_kept_and_used() {
    let Some(card) = card() else { return };
    let folder = tempfile::tempdir().unwrap();
    let folder = &folder.path().join("packed");
    let (mut matrix, _) = on_card(&card, Format::Q8_0, 64);
    let (measured, source) = planned(&card, &mut matrix, folder, Duration::from_secs(300));
    let Source::Measured { classes: 5, changed, left: 0 } = source else { panic!("{source:?}") };
    println!("{changed} of 5 classes have another cut than usual: {measured:?}");
    let (kept, source) = planned(&card, &mut matrix, folder, Duration::ZERO);
    assert_eq!((&kept, source), (&measured, Source::File));
    // One file, a lock, and nothing unfinished.
    let names = || std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names().filter(|name| name.ends_with(".json")).count(), 1, "{:?}", names().collect::<Vec<_>>());
    assert_eq!(names().count(), 2, "{:?}", names().collect::<Vec<_>>());

    // What the file says is what computes: the same bits as with that cut by hand.
    let store = Store::new(folder, &card);
    let x = floats(1, 64);
    for cut in card.cuts(1) {
        let mut cuts = kept.clone();
        cuts.iter_mut().filter(|(class, _)| class.columns == 1).for_each(|(_, kept)| *kept = cut);
        store.write(&cuts, &[]).unwrap();
        let (_, source) = planned(&card, &mut matrix, folder, Duration::ZERO);
        assert_eq!((source, matrix.pieces()[0].cuts[0]), (Source::File, cut));
        let by_file = products(&card, &matrix, &x, 1);
        cut_all(&mut matrix, cut);
        assert_eq!(by_file, products(&card, &matrix, &x, 1), "{cut:?}");
    }

    // A matrix of another size is measured, and the first one's are kept beside it.
    let (mut other, _) = on_card(&card, Format::Q8_0, 96);
    let (both, source) = planned(&card, &mut other, folder, Duration::ZERO);
    assert_eq!(source, Source::Measured { classes: 0, changed: 0, left: 5 });
    assert_eq!(both.len(), 10);
    assert_eq!(store.read(&card).as_ref(), Some(&both));
}

/// A file that this build could not have written on this card is as good as none, and is replaced.
#[test]
fn a_gpus_file_that_is_damaged_or_of_another_card_is_ignored() {
    let Some(card) = card() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (mut matrix, _) = on_card(&card, Format::Q8_0, 64);
    let unmeasured = || Source::Measured { classes: 0, changed: 0, left: 5 };
    let (cuts, source) = planned(&card, &mut matrix, folder.path(), Duration::ZERO);
    assert_eq!(source, unmeasured());
    let store = Store::new(folder.path(), &card);
    let good = std::fs::read_to_string(&store.path).unwrap();
    let value = || serde_json::from_str::<serde_json::Value>(&good).unwrap();
    let changed = |place: &str, to: serde_json::Value| {
        let mut value = value();
        *value.pointer_mut(place).unwrap() = to;
        value.to_string()
    };
    let entry = value()["cuts"][0].clone();
    let bad = [
        String::new(),
        "{".into(),
        "[]".into(),
        good[..good.len() / 2].into(),
        "[".repeat(100_000),
        " ".repeat(2 << 20),
        changed("/made/card", "another".into()),
        changed("/made/driver", "another".into()),
        changed("/made/cubecl", "0.0.1".into()),
        changed("/made/kernels", 0.into()),
        changed("/cuts/0/threads", 0.into()),
        changed("/cuts/0/threads", 48.into()),
        changed("/cuts/0/threads", 1_024.into()),
        changed("/cuts/0/threads", (1u64 << 40).into()),
        changed("/cuts/0/threads", (-64).into()),
        changed("/cuts/0/outputs_at_once", 0.into()),
        changed("/cuts/0/outputs_at_once", 4_000_000_000u32.into()),
        changed("/cuts/0/columns", 0.into()),
        changed("/cuts/0/columns", 3.into()),
        changed("/cuts/0/columns", 4_000_000_000u32.into()),
        changed("/cuts/0/outputs", 131.into()),
        changed("/cuts/0/inputs", 0.into()),
        changed("/cuts/0/form", "../../x".into()),
        changed("/cuts/0/form", "x".repeat(1_000).into()),
        changed("/cuts", serde_json::Value::Array(vec![entry; 10_000])),
        changed("/cuts/0", serde_json::json!({"form": "centred-8"})),
    ];
    for bad in bad {
        std::fs::write(&store.path, &bad).unwrap();
        let shown = &bad[..bad.len().min(300)];
        assert_eq!(store.read(&card), None, "{shown}");
        let (again, source) = planned(&card, &mut matrix, folder.path(), Duration::ZERO);
        assert_eq!((again, source), (cuts.clone(), unmeasured()), "{shown}");
        assert_eq!(std::fs::read_to_string(&store.path).unwrap(), good, "{shown}");
    }
    // Bytes that are no text.
    std::fs::write(&store.path, [0xff; 100]).unwrap();
    assert_eq!(store.read(&card), None);
    // A card that could not run what another could has a file of its own.
    let other = Card { name: "another".into(), ..card.clone() };
    assert_ne!(Store::new(folder.path(), &other).path, store.path);
    // No file at all: a folder in its place, which nothing replaces, and a folder that cannot be one.
    std::fs::remove_file(&store.path).unwrap();
    std::fs::create_dir(&store.path).unwrap();
    assert_eq!(planned(&card, &mut matrix, folder.path(), Duration::ZERO), (cuts.clone(), unmeasured()));
    let no_folder = folder.path().join("file");
    std::fs::write(&no_folder, "").unwrap();
    assert_eq!(planned(&card, &mut matrix, &no_folder, BUDGET), (Cuts::new(), Source::Nothing));
    assert_eq!(matrix.pieces()[0].cuts, COLUMNS.map(Cut::usual));
}

/// Engines that start together: one measures, the others find its outcome, and the file is whole at every moment.
#[test]
fn engines_that_tune_a_gpu_at_once_do_no_harm() {
    let Some(card) = card() else { return };
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path(), &card);
    let Lock::Held(lock) = store.lock(Duration::ZERO) else { panic!("it is free") };
    assert!(matches!(store.lock(Duration::from_millis(150)), Lock::Busy));
    drop(lock);
    let (matrix, _) = on_card(&card, Format::Q8_0, 64);
    let pieces: Vec<&Piece> = matrix.pieces().iter().collect();
    let (first, _) = plan(&card, &pieces, folder.path(), Duration::ZERO);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..50).for_each(|_| Store::new(folder.path(), &card).write(&first, &[]).unwrap()));
        }
        for _ in 0..200 {
            assert_eq!(store.read(&card).as_ref(), Some(&first));
        }
    });
    std::fs::remove_file(&store.path).unwrap();
    let sources: Vec<Source> = std::thread::scope(|scope| {
        let start = || scope.spawn(|| plan(&card, &pieces, folder.path(), Duration::ZERO).1);
        let engines: Vec<_> = (0..4).map(|_| start()).collect();
        engines.into_iter().map(|engine| engine.join().unwrap()).collect()
    });
    assert_eq!(sources.iter().filter(|source| **source == Source::File).count(), 3, "{sources:?}");
}

/// An engine is of another numerics class where its kernels are cut otherwise. Software is not tuned; a card is, where
/// there is a folder to keep the outcome.
#[test]
fn the_numerics_class_says_how_a_gpu_is_tuned() {
    let Some(card) = card() else { return };
    let folder = tempfile::tempdir().unwrap();
    let cache = PackedCache { folder: folder.path().into(), digest: "00".into(), limit: 0 };
    let options = ModelOptions { packed_cache: Some(cache), slots: 1, ..ModelOptions::default() };
    let open = |card: &Card, options: &ModelOptions| {
        let gguf = std::sync::Arc::new(Gguf::from_bytes(llama(Sizes::default()).bytes()).unwrap());
        let placement = Placement { place: Place::Gpu(card.clone()), backend: String::new(), numerics: "gpu".into() };
        Model::load(gguf, placement, options).unwrap()
    };
    let class = |model: &Model| model.capabilities().numerics.clone();
    let software = Card { software: true, ..card.clone() };
    let usual = class(&open(&software, &options));
    assert!(usual.strip_prefix("gpu-t").is_some_and(|digest| digest.len() == 8), "{usual}");
    let store = Store::new(folder.path(), &card);
    assert!(!store.path.exists());

    // As on a real card, with what is kept there: every class has a cut of its own.
    let hardware = Card { software: false, ..card };
    assert_eq!(class(&open(&hardware, &ModelOptions { packed_cache: None, ..options.clone() })), usual);
    let mut decoder = decoder(&hardware);
    tune(&mut decoder, folder.path(), Duration::ZERO);
    assert_eq!(format!("gpu-{}", decoder.tuning()), usual);
    let mut cuts = store.read(&hardware).unwrap();
    assert!(!cuts.is_empty());
    assert_eq!(class(&open(&hardware, &options)), usual);
    let (first, cut) = cuts.iter_mut().next().unwrap();
    let others: Vec<Cut> = hardware.cuts(first.columns as usize).filter(|other| other != cut).collect();
    let mut seen = BTreeSet::from([usual.clone()]);
    for other in others {
        *cuts.values_mut().next().unwrap() = other;
        store.write(&cuts, &[]).unwrap();
        let mut model = open(&hardware, &options);
        assert!(seen.insert(class(&model)), "{other:?}: {seen:?}");
        model.assign(0, &[0], 0).unwrap();
        let logits = model.step(&[StepEntry { token: 1, slot: 0, position: 0 }], &[0]).unwrap();
        assert!(logits.row(0).iter().all(|logit| logit.is_finite()));
    }
    // The same file, the same class.
    assert_eq!(class(&open(&hardware, &options)), class(&open(&hardware, &options)));
}

fn decoder(card: &Card) -> Decoder {
    let gguf = Gguf::from_bytes(llama(Sizes::default()).bytes()).unwrap();
    let model = crate::model::Hyperparameters::from_gguf(&gguf).unwrap();
    Decoder::load(card.clone(), &gguf, &model, 4).unwrap()
}

/// A kernel that cannot be compiled, or computes something else, is left out, and others go on.
#[test]
fn a_kernel_that_fails_on_a_gpu_is_left_out() {
    let Some(card) = card() else { return };
    let (matrix, _) = on_card(&card, Format::Q8_0, 64);
    let pieces: Vec<&Piece> = matrix.pieces().iter().collect();
    let kinds = kinds(&pieces);
    let bench = Bench::new(&card, &kinds[0], 2, Instant::now() + BUDGET);
    let due = bench.results(Cut::usual(2)).unwrap();
    // More threads than any card has for a workgroup.
    let why = bench.try_out(Cut { threads: 1 << 20, outputs: 1 }, &due, 1.0).unwrap_err();
    println!("{why}");
    let other: Vec<f32> = due.iter().map(|value| value + 1.0).collect();
    assert_eq!(bench.try_out(Cut::usual(2), &other, 1.0).unwrap_err(), "its results are others");
    for cut in card.cuts(2) {
        assert!(bench.try_out(cut, &due, 1.0).is_ok_and(|seconds| seconds > 0.0), "{cut:?}");
    }
}

#[test]
fn the_usual_cut_stays_unless_another_is_clearly_faster() {
    let [a, b, c] = [1, 2, 4].map(|outputs| Cut { threads: 64, outputs });
    let chosen = |times: [f64; 3]| choose(&[(a, times[0]), (b, times[1]), (c, times[2])]).0;
    assert_eq!(chosen([1.0, 0.98, 0.975]), a);
    assert_eq!(chosen([1.0, 0.5, 0.9]), b);
    // Nearly as fast as the fastest, and before it.
    assert_eq!(chosen([1.0, 0.51, 0.5]), b);
    assert_eq!(chosen([1.0, 0.6, 0.5]), c);
    assert_eq!(choose(&[(a, 1.0)]).0, a);
}

#[test]
fn results_agree_up_to_the_order_of_sums() {
    let due = [1.0, -2.0, 0.0];
    assert!(agree(&[1.0005, -2.0, 1e-3], &due));
    assert!(!agree(&[1.0, -2.01, 0.0], &due));
    assert!(!agree(&[1.0, f32::NAN, 0.0], &due));
    assert!(!agree(&[1.0, -2.0], &due));
    // A matrix of zeros.
    assert!(agree(&[0.0], &[0.0]) && !agree(&[1e-9], &[0.0]) && !agree(&[f32::NAN], &[0.0]));
}

/// What would need more threads, memory or registers than there are is no candidate.
#[test]
fn cuts_are_those_that_a_gpu_can_run() {
    for columns in COLUMNS {
        let all: Vec<Cut> = Cut::all(columns, 64 << 10, 1_024).collect();
        assert!(all.contains(&Cut::usual(columns)) && all.len() >= 8, "{columns}: {all:?}");
        assert!(all.iter().all(|cut| cut.outputs * columns as u32 <= cut.threads.min(32)), "{columns}: {all:?}");
        let small: Vec<Cut> = Cut::all(columns, 16 << 10, 128).collect();
        assert!(small.contains(&Cut::usual(columns)) && small.iter().all(|cut| cut.threads <= 128), "{columns}");
        assert!(Cut::all(columns, 64, 1_024).next().is_none());
    }
    // As a file may have it.
    assert_eq!(Cut::all(64, 64 << 10, 1_024).count(), 0);
}
