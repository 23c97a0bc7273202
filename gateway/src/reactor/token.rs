//! The ring's `user_data`: who a completion belongs to, in 64 bits.
//!
//! Layout: bits 60..64 the kind, bits 32..60 an index, bits 0..32 a tag.

/// Largest index of a front end or an operation: 28 bits.
pub(super) const INDEX_MAX: u32 = (1 << 28) - 1;

const KIND_SHIFT: u32 = 60;
const INDEX_SHIFT: u32 = 32;

/// Who a completion belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Token {
    /// A cache operation of the reactor, by its index in the table of operations.
    Op {
        /// The index.
        index: u32,
    },
    /// Several cache operations as one, by its index in the table of runs.
    Run {
        /// The index.
        index: u32,
    },
    /// An operation of a front end.
    FrontEnd {
        /// The front end.
        index: u32,
        /// The front end's own name for it.
        tag: u32,
    },
    /// The read of the doorbell.
    Doorbell,
    /// The timer.
    Timer,
    /// The sync of the cache device.
    Sync,
    /// The timer of held requests.
    Hold,
    /// Advice to the kernel about its page cache.
    Advice,
    /// The socket of the errand.
    Errand,
    /// No more waiting for that.
    GivenUp,
    /// None of ours: cannot come back from a kernel that works.
    Unknown,
}

impl Token {
    /// As the ring carries it.
    ///
    /// # Panics
    /// If an index needs more than 28 bits, of which the tables' bounds keep far away.
    pub(super) fn pack(self) -> u64 {
        let (kind, index, tag) = match self {
            Self::Op { index } => (1_u64, index, 0),
            Self::FrontEnd { index, tag } => (2, index, tag),
            Self::Doorbell => (3, 0, 0),
            Self::Timer => (4, 0, 0),
            Self::Sync => (5, 0, 0),
            Self::Hold => (6, 0, 0),
            Self::Advice => (7, 0, 0),
            Self::Run { index } => (8, index, 0),
            Self::Errand => (9, 0, 0),
            Self::GivenUp => (10, 0, 0),
            Self::Unknown => (0, 0, 0),
        };
        assert!(index <= INDEX_MAX, "an index that 28 bits do not hold");
        kind << KIND_SHIFT | u64::from(index) << INDEX_SHIFT | u64::from(tag)
    }

    /// From what the ring carried.
    pub(super) fn unpack(word: u64) -> Self {
        let index = u32::try_from(word >> INDEX_SHIFT & u64::from(INDEX_MAX)).unwrap_or(INDEX_MAX);
        let tag = u32::try_from(word & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        match word >> KIND_SHIFT {
            1 => Self::Op { index },
            2 => Self::FrontEnd { index, tag },
            3 => Self::Doorbell,
            4 => Self::Timer,
            5 => Self::Sync,
            6 => Self::Hold,
            7 => Self::Advice,
            8 => Self::Run { index },
            9 => Self::Errand,
            10 => Self::GivenUp,
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_packed_and_unpacked_is_the_same() {
        for token in [
            Token::Op { index: 0 },
            Token::Op { index: INDEX_MAX },
            Token::FrontEnd {
                index: 7,
                tag: u32::MAX,
            },
            Token::FrontEnd {
                index: INDEX_MAX,
                tag: 0,
            },
            Token::Doorbell,
            Token::Timer,
            Token::Sync,
            Token::Hold,
            Token::Advice,
            Token::Run { index: INDEX_MAX },
            Token::Errand,
            Token::GivenUp,
            Token::Unknown,
        ] {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
