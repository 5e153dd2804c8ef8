use super::*;
use crate::cache::heap::heap_ranks;
use crate::cache::{PageIndex, RankMemory, RankShape};
use crate::text::encode;

const SEED: u64 = 42;

fn rank_shape(shape: &ModelShape, page_size: usize, pages: usize) -> RankShape {
    RankShape {
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        page_size,
        pages,
        aux_slots: 1,
    }
}

/// Pages in an order that is neither ascending nor dense, as a busy allocator hands them out.
fn scattered(pages: usize) -> Vec<PageIndex> {
    (0..pages)
        .map(|i| PageIndex(u32::try_from((i * 7 + 3) % pages).expect("few pages")))
        .collect()
}

fn greedy(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]).then(b.cmp(a)));
    u32::try_from(best.expect("a vocabulary")).expect("a token")
}

struct Run {
    ranks: Vec<RankMemory>,
    pages: Vec<PageIndex>,
    /// Logits of the prompt's last token and of every generated one, as bits.
    logits: Vec<Vec<u32>>,
    tokens: Vec<u32>,
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Prefills `prompt` in chunks and generates greedily.
fn run(
    model: &Model,
    prompt: &[u32],
    tp: usize,
    page_size: usize,
    chunk: usize,
    new: usize,
) -> Run {
    // Seven and the page count must be coprime for `scattered` to be a permutation.
    compute_alone();
    let mut count = (prompt.len() + new).div_ceil(page_size);
    count += usize::from(count.is_multiple_of(7));
    let ranks = heap_ranks(rank_shape(model.shape(), page_size, count), tp);
    let pages = scattered(count);
    let kv = PagedKv {
        ranks: &ranks,
        pages: &pages,
    };
    let mut last = vec![];
    for (i, tokens) in prompt.chunks(chunk).enumerate() {
        last = model.forward(tokens, i * chunk, &kv).expect("forward");
    }
    let (mut logits, mut tokens) = (vec![bits(&last)], vec![greedy(&last)]);
    for i in 0..new - 1 {
        last = model
            .forward(&[tokens[i]], prompt.len() + i, &kv)
            .expect("forward");
        logits.push(bits(&last));
        tokens.push(greedy(&last));
    }
    Run {
        ranks,
        pages,
        logits,
        tokens,
    }
}

#[test]
fn logits_are_bit_equal_for_every_tp_chunk_and_page_size() {
    for shape in [ModelShape::default(), ModelShape::small()] {
        logits_are_bit_equal(shape);
    }
}

fn logits_are_bit_equal(shape: ModelShape) {
    let model = Model::from_seed(shape, SEED).expect("model");
    let prompt = encode("The quick brown fox jumps over the lazy dog. Pack my box with jugs.");
    let reference = run(&model, &prompt, 1, 16, prompt.len(), 12);
    for (tp, page_size, chunk) in [
        (2, 16, 4096),
        (4, 16, 4096),
        (1, 16, 1),
        (2, 16, 7),
        (1, 16, 16),
        (2, 1, 16),
        (1, 5, 7),
        (2, 64, 33),
        (1, 128, 4096),
    ] {
        let other = run(&model, &prompt, tp, page_size, chunk, 12);
        assert_eq!(
            other.tokens, reference.tokens,
            "tp {tp} page {page_size} chunk {chunk}"
        );
        assert!(
            other.logits == reference.logits,
            "tp {tp} page {page_size} chunk {chunk}"
        );
    }
}

#[test]
fn two_processes_with_one_seed_have_one_model_and_other_seeds_differ() {
    let shape = ModelShape {
        layers: 2,
        ..ModelShape::default()
    };
    let prompt = encode("seeded");
    let of = |seed, shape| {
        let model = Model::from_seed(shape, seed).expect("model");
        run(&model, &prompt, 1, 16, 64, 4).logits
    };
    assert!(of(1, shape) == of(1, shape));
    assert!(of(1, shape) != of(2, shape));
    assert!(
        of(1, shape)
            != of(
                1,
                ModelShape {
                    tied: true,
                    ..shape
                }
            )
    );
}

#[test]
fn damage_to_one_page_of_any_layer_changes_what_is_generated() {
    damage_shows(ModelShape::default());
}

#[test]
fn so_it_does_in_the_small_model() {
    damage_shows(ModelShape::small());
}

fn damage_shows(shape: ModelShape) {
    let model = Model::from_seed(shape, SEED).expect("model");
    let prompt = encode("Damage must show: forty-eight tokens and a few more here.");
    let (new, page_size) = (24, 16);
    let clean = run(&model, &prompt, 1, page_size, 4096, new);
    let (rank, whole_pages) = (&clean.ranks[0], prompt.len() / page_size);
    let kv = PagedKv {
        ranks: &clean.ranks,
        pages: &clean.pages,
    };
    let len = rank.shape.page_bytes();
    let (mut damages, mut other_texts) = (0, 0);
    for entry in 0..2 * model.shape().layers {
        for page in &clean.pages[..whole_pages] {
            let offset = u64::from(page.0) * len as u64;
            let mut kept = vec![0; len];
            rank.store.read(entry, offset, &mut kept);
            rank.store.write(entry, offset, &vec![0; len]);
            // Decode from the damaged cache, as a decode worker would after a lost page.
            let mut tokens = vec![clean.tokens[0]];
            for i in 0..new - 1 {
                let logits = model
                    .forward(&[tokens[i]], prompt.len() + i, &kv)
                    .expect("forward");
                assert!(
                    i > 0 || bits(&logits) != clean.logits[1],
                    "entry {entry} {page:?}"
                );
                tokens.push(greedy(&logits));
            }
            damages += 1;
            other_texts += usize::from(tokens != clean.tokens);
            rank.store.write(entry, offset, &kept);
        }
    }
    // The very next logits always notice; the text nearly always.
    assert!(
        other_texts * 10 >= damages * 9,
        "{other_texts} of {damages} damages changed the text"
    );
}

#[test]
fn greedy_text_depends_on_the_prompt_and_does_not_loop() {
    for shape in [ModelShape::default(), ModelShape::small()] {
        text_depends_on_the_prompt(shape);
    }
}

fn text_depends_on_the_prompt(shape: ModelShape) {
    let model = Model::from_seed(shape, SEED).expect("model");
    let prompts = [
        "Hello, this is a test",
        "Hello, this is a tesu",
        "What is RDMA?",
    ];
    let texts: Vec<Vec<u32>> = prompts
        .iter()
        .map(|p| run(&model, &encode(p), 1, 16, 64, 50).tokens)
        .collect();
    for (i, text) in texts.iter().enumerate() {
        let mut distinct = text.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert!(
            distinct.len() >= 10,
            "prompt {i} gives only {} tokens: {text:?}",
            distinct.len()
        );
        // No period up to 12 explains the second half: the output is not stuck in a cycle.
        for period in 1..=12 {
            let repeats = (25..50).all(|j| text[j] == text[j - period]);
            assert!(
                !repeats,
                "prompt {i} repeats with period {period}: {text:?}"
            );
        }
        for other in &texts[..i] {
            assert_ne!(text[..8], other[..8], "two prompts begin alike");
        }
    }
}

#[test]
fn a_chunk_outside_the_context_is_refused() {
    let shape = ModelShape {
        layers: 1,
        context: 8,
        ..ModelShape::default()
    };
    let model = Model::from_seed(shape, SEED).expect("model");
    let ranks = heap_ranks(rank_shape(&shape, 8, 2), 1);
    let pages = [PageIndex(0), PageIndex(1)];
    let kv = PagedKv {
        ranks: &ranks,
        pages: &pages,
    };
    assert!(model.forward(&[1; 9], 0, &kv).is_err());
    assert!(model.forward(&[1], 8, &kv).is_err());
    assert!(model.forward(&[], 0, &kv).is_err());
    assert!(model.forward(&[1; 8], 0, &kv).is_ok());
}

#[test]
fn shapes_that_do_not_fit_are_refused_in_words() {
    let good = ModelShape::default();
    assert_eq!(good.check(), Ok(()));
    assert_eq!(ModelShape { ffn: 0, ..good }.check(), Err(ShapeError::Zero));
    assert_eq!(
        ModelShape {
            head_dim: 7,
            ..good
        }
        .check(),
        Err(ShapeError::OddHead(7))
    );
    let grouping = ShapeError::Grouping {
        q_heads: 8,
        kv_heads: 3,
    };
    assert_eq!(
        ModelShape {
            kv_heads: 3,
            ..good
        }
        .check(),
        Err(grouping)
    );
}
