//! INT8 costs the default model less than one percent of its perplexity. Its weights as they are (Q4_1), written as
//! f32, are the truth here. A short text: `ingle models eval` measures longer ones.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::atomic::AtomicBool;

use ingle_engine::DeviceChoice;
use ingle_engine::perplexity::Subject;
use ingle_engine::quantize::{self, Conversion};

mod support;

const TEXT: &str = include_str!("fixtures/english.txt");
const CONTEXT: usize = 64;
const TOKENS: usize = 128;

fn convert(from: &Path, to: &str, path: &Path) {
    let conversion = Conversion::plan(quantize::open(from).unwrap(), to.parse().unwrap(), true).unwrap();
    conversion.write(path, false, &AtomicBool::new(false), &mut |_, _| ()).unwrap();
    assert_eq!(std::fs::metadata(path).unwrap().len(), conversion.file_bytes());
}

fn perplexity(path: &Path) -> f64 {
    let mut subject = Subject::open(path, DeviceChoice::Cpu).unwrap();
    let tokens = subject.tokenize(TEXT).unwrap();
    subject.evaluate(&tokens[..TOKENS], CONTEXT, &mut |_, _| true).unwrap().perplexity
}

#[test]
fn int8_keeps_its_perplexity() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    convert(&support::model(), "f32", &path("f32.gguf"));
    convert(&path("f32.gguf"), "int8", &path("int8.gguf"));
    let (float, int8) = (perplexity(&path("f32.gguf")), perplexity(&path("int8.gguf")));
    assert!((5.0..100.0).contains(&float), "{float}");
    assert!((int8 / float - 1.0).abs() < 0.01, "{int8} {float}");
}
