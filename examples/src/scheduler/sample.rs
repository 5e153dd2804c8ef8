//! Choosing a token from logits.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::job::Sampling;

/// The token at `position` of the sequence. Greedy takes the first of equal maxima. A draw depends on the seed and
/// the position alone, so a prefill and a decode that share a sequence draw what one worker would have drawn.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the vocabulary has a few hundred entries"
)]
pub(super) fn choose(logits: &[f32], sampling: &Sampling, position: usize) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    if sampling.temperature <= 0.0 {
        return best as u32;
    }
    let mut stream = ChaCha8Rng::seed_from_u64(sampling.seed);
    stream.set_stream(position as u64);
    let unit = f64::from(stream.next_u32()) / (f64::from(u32::MAX) + 1.0);
    let weights: Vec<f64> = logits
        .iter()
        .map(|logit| f64::from((logit - logits[best]) / sampling.temperature).exp())
        .collect();
    let mut left = unit * weights.iter().sum::<f64>();
    for (token, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return token as u32;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f32, seed: u64) -> Sampling {
        Sampling {
            max_new_tokens: 1,
            temperature,
            seed,
            stop: vec![],
            ignore_eos: true,
        }
    }

    #[test]
    fn greedy_takes_the_first_maximum() {
        assert_eq!(choose(&[0.0, 3.0, 3.0, -1.0], &sampling(0.0, 1), 9), 1);
    }

    #[test]
    fn draws_repeat_by_seed_and_position_and_follow_the_weights() {
        let logits = [0.0, 2.0_f32.ln(), f32::NEG_INFINITY];
        let draw = |seed, position| choose(&logits, &sampling(1.0, seed), position);
        assert!((0..50).all(|p| draw(3, p) == draw(3, p)));
        assert!((0..50).any(|p| draw(3, p) != draw(4, p)));
        let ones = (0..3000).filter(|p| draw(5, *p) == 1).count();
        assert!(
            (1900..2100).contains(&ones),
            "{ones} of 3000, expected 2000"
        );
        assert!((0..3000).all(|p| draw(6, p) < 2));
    }
}
