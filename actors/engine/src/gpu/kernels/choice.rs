//! The choice of the next token where nothing but its scores has a say: the likeliest one, or a draw behind
//! temperature, top-k, top-p and min-p, as [`crate::sampler`] defines them. A workgroup for each row.
//!
//! A row is read three or four times. What may be drawn is found among those that are likely enough, of which a
//! workgroup's own memory holds [`CANDIDATES`]: a distance from the likeliest is chosen, of a fixed ladder of them,
//! within which everything is that the filters can leave. Where more are within it, the host is to choose.

use cubecl::prelude::*;

/// Threads of a row.
pub(crate) const CHOOSERS: u32 = 256;
/// Tokens that can be looked at one by one.
const CANDIDATES: usize = 1024;
/// Distances from the likeliest, in nats at the temperature: 0.25, 0.5 … 1, 1.5 … 4, 5 … and so on to 24.
const STEPS: usize = 20;

/// Numbers that a row's choice is made with.
pub(crate) const RULES: usize = 5;
/// And of its result: the token, and one of the next.
pub(crate) const RESULT: usize = 2;
pub(crate) const CHOSEN: u32 = 0;
/// All scores are one number, or none: nobody computed them.
pub(crate) const NOTHING: u32 = 1;
/// Too many tokens are about as likely.
pub(crate) const TOO_MANY: u32 = 2;

const NEVER: f32 = -3e38;

fn distance(step: usize) -> f32 {
    match step {
        0..4 => 0.25 * (step + 1) as f32,
        4..10 => 1.0 + 0.5 * (step - 3) as f32,
        10..16 => 4.0 + (step - 9) as f32,
        _ => 10.0 + 3.5 * (step - 15) as f32,
    }
}

/// `rules`, for each row: 1 ÷ temperature (0: the likeliest), top-k (0: none), top-p, min-p, and 32 random bits;
/// floats by their bits.
#[cube(launch_unchecked)]
pub(crate) fn choose(scores: &[f32], rules: &[u32], out: &mut [u32], width: u32) {
    let threads = comptime!(CHOOSERS as usize);
    let (row, unit, width) = (CUBE_POS_X as usize, UNIT_POS as usize, width as usize);
    let from = row * width;
    let inverse = f32::reinterpret(rules[row * RULES]);
    let top_k = rules[row * RULES + 1usize];
    let top_p = f32::reinterpret(rules[row * RULES + 2usize]);
    let min_p = f32::reinterpret(rules[row * RULES + 3usize]);
    // Never 1, in the 24 bits that such a number has.
    let random = f32::cast_from(rules[row * RULES + 4usize] >> 8u32) * f32::new(1.0 / 16_777_216.0);

    // The likeliest (the first of several), and the least likely.
    let mut values = Shared::<[f32]>::new_slice(threads);
    let mut ids = Shared::<[u32]>::new_slice(threads);
    let mut leasts = Shared::<[f32]>::new_slice(threads);
    let mut best = f32::new(NEVER);
    let mut id = 0u32;
    let mut least = f32::new(-NEVER);
    let mut i = unit;
    while i < width {
        let score = scores[from + i];
        if score > best {
            best = score;
            id = i as u32;
        }
        if score < least {
            least = score;
        }
        i += threads;
    }
    values[unit] = best;
    ids[unit] = id;
    leasts[unit] = least;
    sync_cube();
    let mut half = comptime!(threads / 2).runtime();
    while half > 0usize {
        if unit < half {
            let (a, b) = (values[unit], values[unit + half]);
            let (of_a, of_b) = (ids[unit], ids[unit + half]);
            if b > a || (b == a && of_b < of_a) {
                values[unit] = b;
                ids[unit] = of_b;
            }
            leasts[unit] = min(leasts[unit], leasts[unit + half]);
        }
        sync_cube();
        half /= 2usize;
    }
    let greatest = values[0usize];
    let likeliest = ids[0usize];
    let nothing = leasts[0usize] >= greatest;
    sync_cube();

    let mut state = CHOSEN.runtime();
    let mut chosen = likeliest;
    if nothing {
        state = NOTHING.runtime();
    }
    let draws = inverse > 0.0f32 && !nothing;
    let filters = draws && (top_k > 0u32 || top_p < 1.0f32 || min_p > 0.0f32);

    // How many are within each distance, and their weight; all threads' together in `counts` and `weights`.
    let mut count = Array::<u32>::new(STEPS);
    let mut weight = Array::<f32>::new(STEPS);
    #[unroll]
    for n in 0..STEPS {
        count[n] = 0u32;
        weight[n] = 0.0f32;
    }
    // Each thread has a stretch of its own, so that its sum is that of neighbours.
    let stretch = width.div_ceil(threads);
    let (first, last) = (min(unit * stretch, width), min(unit * stretch + stretch, width));
    let mut whole = 0.0f32;
    if draws {
        for i in first..last {
            let score = scores[from + i];
            let away = (greatest - score) * inverse;
            // False for what is no number.
            if away < 80.0f32 {
                let share = (-away).exp();
                whole += share;
                if filters {
                    #[unroll]
                    for n in 0..STEPS {
                        let within = away <= f32::new(comptime!(distance(n)));
                        count[n] += select(within, 1u32, 0u32);
                        weight[n] += select(within, share, 0.0f32);
                    }
                }
            }
        }
    }
    values[unit] = whole;
    sync_cube();
    let mut total = 0.0f32;
    let mut before = 0.0f32;
    for n in 0..threads {
        if n == unit {
            before = total;
        }
        total += values[n];
    }
    sync_cube();

    if draws && !filters {
        // The thread in whose stretch the place is looks for it there.
        let place = random * total;
        let mut left = place - before;
        if unit == 0usize {
            ids[0usize] = likeliest;
        }
        sync_cube();
        if left >= 0.0f32 && left < whole {
            let mut found = false;
            for i in first..last {
                let away = (greatest - scores[from + i]) * inverse;
                if away < 80.0f32 && !found {
                    left -= (-away).exp();
                    ids[0usize] = i as u32;
                    found = left < 0.0f32;
                }
            }
        }
        sync_cube();
        chosen = ids[0usize];
    }

    if filters {
        // The first distance within which everything is that the filters leave.
        let mut reach = f32::new(comptime!(distance(STEPS - 1)));
        let mut number = 0u32;
        let mut covered = false;
        #[unroll]
        for n in 0..STEPS {
            ids[unit] = count[n];
            values[unit] = weight[n];
            sync_cube();
            let mut all = 0u32;
            let mut sum = 0.0f32;
            for i in 0..threads {
                all += ids[i];
                sum += values[i];
            }
            sync_cube();
            let away = f32::new(comptime!(distance(n)));
            let by_k = top_k > 0u32 && all >= top_k;
            let by_p = top_k == 0u32 && top_p < 1.0f32 && sum >= top_p * total;
            let by_min = top_k == 0u32 && min_p > 0.0f32 && (-away).exp() <= min_p;
            if !covered && (by_k || by_p || by_min) {
                covered = true;
                reach = away;
                number = all;
            }
        }
        if !covered || number > comptime!(CANDIDATES as u32) {
            state = TOO_MANY.runtime();
        } else {
            let mut near = Shared::<[f32]>::new_slice(CANDIDATES);
            let mut of_near = Shared::<[u32]>::new_slice(CANDIDATES);
            let mut kept = Shared::<[f32]>::new_slice(CANDIDATES);
            // In the order of their ids, as stretches are.
            let mut own = 0u32;
            for i in first..last {
                if (greatest - scores[from + i]) * inverse <= reach {
                    own += 1u32;
                }
            }
            ids[unit] = own;
            sync_cube();
            let mut at = 0u32;
            for n in 0..unit {
                at += ids[n];
            }
            for i in first..last {
                let score = scores[from + i];
                if (greatest - score) * inverse <= reach {
                    near[at as usize] = score;
                    of_near[at as usize] = i as u32;
                    at += 1u32;
                }
            }
            sync_cube();
            let number = number as usize;
            // Their ranks: who stands before whom, and with what weight.
            let mut n = unit;
            while n < number {
                let mut rank = 0u32;
                for other in 0..number {
                    if near[other] > near[n] || (near[other] == near[n] && other < n) {
                        rank += 1u32;
                    }
                }
                let share = ((near[n] - greatest) * inverse).exp();
                kept[n] = select(top_k == 0u32 || rank < top_k, share, 0.0f32);
                n += threads;
            }
            sync_cube();
            let mut goal = total;
            if top_k > 0u32 {
                goal = 0.0f32;
                for other in 0..number {
                    goal += kept[other];
                }
            }
            goal *= top_p;
            // Who is kept: those before whom less than the goal stands. First all look, then all write.
            let each = comptime!(CANDIDATES / CHOOSERS as usize);
            let mut verdict = Array::<f32>::new(each);
            #[unroll]
            for turn in 0..each {
                let n = unit + comptime!(turn * CHOOSERS as usize);
                verdict[turn] = 0.0f32;
                if n < number {
                    let mut above = 0.0f32;
                    for other in 0..number {
                        if near[other] > near[n] || (near[other] == near[n] && other < n) {
                            above += kept[other];
                        }
                    }
                    let share = kept[n];
                    let stays = (top_p >= 1.0f32 || above < goal) && share >= min_p;
                    verdict[turn] = select(stays, share, 0.0f32);
                }
            }
            sync_cube();
            #[unroll]
            for turn in 0..each {
                let n = unit + comptime!(turn * CHOOSERS as usize);
                if n < number {
                    kept[n] = verdict[turn];
                }
            }
            sync_cube();
            let mut sum = 0.0f32;
            for n in 0..number {
                sum += kept[n];
            }
            let mut left = random * sum;
            let mut found = false;
            for n in 0..number {
                if !found && kept[n] > 0.0f32 {
                    left -= kept[n];
                    chosen = of_near[n];
                    found = left < 0.0f32;
                }
            }
        }
    }
    if unit == 0usize {
        out[row * RESULT] = chosen;
        out[row * RESULT + 1usize] = state;
    }
}
