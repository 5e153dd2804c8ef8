//! How large the blocks are in which workers tell of their prefix caches. A prompt is cut and hashed once for all of them, so only
//! workers of one size are listened to.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The size in use, for as long as anybody uses it.
#[derive(Debug, Default)]
pub struct Blocks {
    /// 0: nobody tells.
    tokens: AtomicU32,
    users: Mutex<usize>,
}

/// Somebody who tells of blocks of this size, until it is dropped.
#[derive(Debug)]
pub struct BlockUser {
    blocks: Arc<Blocks>,
}

impl Blocks {
    /// Tokens per block; 0: nobody tells.
    pub fn tokens(&self) -> u32 {
        self.tokens.load(Ordering::Relaxed)
    }

    /// Joins those who tell of blocks of `tokens`; none: the others' are of another size.
    pub fn enter(self: &Arc<Self>, tokens: u32) -> Option<BlockUser> {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if *users > 0 && self.tokens() != tokens {
            return None;
        }
        *users += 1;
        self.tokens.store(tokens, Ordering::Relaxed);
        Some(BlockUser {
            blocks: Arc::clone(self),
        })
    }
}

impl Drop for BlockUser {
    fn drop(&mut self) {
        let users = self.blocks.users.lock();
        let mut users = users.unwrap_or_else(PoisonError::into_inner);
        *users -= 1;
        if *users == 0 {
            self.blocks.tokens.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_size_at_a_time() {
        let blocks = Arc::new(Blocks::default());
        assert_eq!(blocks.tokens(), 0);
        let (first, second) = (blocks.enter(64), blocks.enter(64));
        assert!(first.is_some() && second.is_some() && blocks.enter(16).is_none());
        drop(first);
        assert_eq!(blocks.tokens(), 64);
        drop(second);
        assert_eq!(blocks.tokens(), 0);
        let other = blocks.enter(16);
        assert_eq!((other.is_some(), blocks.tokens()), (true, 16));
    }
}
