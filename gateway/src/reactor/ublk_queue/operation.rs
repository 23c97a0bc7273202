//! The names of a queue's ring operations, in the 32 bits that a front end has for them.

/// An operation of a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Operation {
    /// FETCH, COMMIT_AND_FETCH or NEED_GET_DATA: completes with a request of this tag.
    Fetch(u16),
    /// Puts the pages of this tag's request into the buffer table.
    Register(u16),
    /// Takes this entry out of the buffer table.
    Unregister(u16),
    /// Follows a commit from whose buffer the kernel copies.
    Lent,
    /// Follows the first FETCHes.
    Fence,
}

impl Operation {
    /// The kind in the upper half, the tag or entry in the lower one.
    pub(super) fn pack(self) -> u32 {
        let (kind, number) = match self {
            Self::Fetch(tag) => (0_u32, tag),
            Self::Register(tag) => (1, tag),
            Self::Unregister(entry) => (2, entry),
            Self::Lent => (3, 0),
            Self::Fence => (4, 0),
        };
        kind << 16 | u32::from(number)
    }

    /// From what [`Operation::pack`] gave.
    pub(super) fn unpack(word: u32) -> Self {
        let number = (word & 0xffff) as u16;
        match word >> 16 {
            0 => Self::Fetch(number),
            1 => Self::Register(number),
            2 => Self::Unregister(number),
            3 => Self::Lent,
            4 => Self::Fence,
            _ => unreachable!("only what was packed comes back"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operation_packed_and_unpacked_is_the_same() {
        for operation in [
            Operation::Fetch(0),
            Operation::Fetch(u16::MAX),
            Operation::Register(7),
            Operation::Unregister(u16::MAX),
            Operation::Lent,
            Operation::Fence,
        ] {
            assert_eq!(Operation::unpack(operation.pack()), operation);
        }
    }
}
