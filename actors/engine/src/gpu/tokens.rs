//! From scores on a card to tokens, or to the host.

use cubecl::prelude::*;

use super::{Buffer, Card, kernels};
use crate::Draw;

/// The tokens of the rows that have a draw, where the card can choose: it cannot where very many are about as likely.
pub(super) fn choose(
    card: &Card,
    scores: &Buffer,
    width: usize,
    draws: &[Option<Draw>],
) -> Result<Vec<Option<u32>>, String> {
    const LIKELIEST: Draw = Draw { inverse_temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, random: 0 };
    let rules = draws.iter().map(|draw| draw.unwrap_or(LIKELIEST)).flat_map(|draw| {
        let Draw { inverse_temperature, top_k, top_p, min_p, random } = draw;
        [inverse_temperature.to_bits(), top_k, top_p.to_bits(), min_p.to_bits(), (random >> 32) as u32]
    });
    let rules = card.words(&rules.collect::<Vec<u32>>());
    let out = card.room(draws.len() * kernels::RESULT);
    // SAFETY: there is a row of scores for each draw.
    unsafe {
        kernels::choose::launch_unchecked(
            &card.client,
            CubeCount::Static(draws.len() as u32, 1, 1),
            CubeDim::new_1d(kernels::CHOOSERS),
            scores.arg(),
            rules.arg(),
            out.arg(),
            width as u32,
        );
    }
    let result = card.read(&out)?;
    let chosen = draws.iter().zip(result.chunks_exact(kernels::RESULT)).map(|(draw, result)| {
        let (token, state) = (result[0].to_bits(), result[1].to_bits());
        match (draw, state) {
            (Some(_), kernels::CHOSEN) if (token as usize) < width => Ok(Some(token)),
            (None, _) | (_, kernels::TOO_MANY) => Ok(None),
            _ => Err(LOST.to_string()),
        }
    });
    chosen.collect()
}

const LOST: &str = "the device computed nothing: it was lost, or its driver failed";

/// Refuses logits that nobody computed.
///
/// A kernel that fails on the device's own thread can leave memory untouched and say nothing. Such rows are all of one
/// number, or no numbers, and must not become an answer.
pub(super) fn check(values: &[f32], width: usize) -> Result<(), String> {
    let nothing = |row: &[f32]| row.iter().all(|x| *x == row[0]) || row.iter().all(|x| x.is_nan());
    match values.chunks_exact(width).any(nothing) {
        true => Err(LOST.into()),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_lost_device_leaves_is_no_answer() {
        assert!(check(&[0.0, 1.0, 0.5, -1.0], 2).is_ok());
        assert!(check(&[0.0, 1.0, 0.0, 0.0], 2).is_err());
        assert!(check(&[f32::NAN, f32::NAN], 2).is_err());
    }
}
