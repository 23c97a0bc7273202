//! Counting by kind: enums whose variants have names for people, and how often each was seen.

use std::fmt;
use std::marker::PhantomData;

/// A kind of thing that is counted.
pub trait Counted: Copy {
    /// The names, in order.
    const NAMES: &'static [&'static str];

    fn index(self) -> usize;
}

/// An enum of what is counted, each with its name.
macro_rules! counted {
    ($(#[$about:meta])* $name:ident { $($(#[$note:meta])* $variant:ident: $text:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name {
            $($(#[$note])* $variant,)*
        }

        impl $name {
            #[allow(dead_code, reason = "not all are walked through")]
            pub const ALL: &[Self] = &[$(Self::$variant,)*];
        }

        impl crate::counts::Counted for $name {
            const NAMES: &'static [&'static str] = &[$($text,)*];

            fn index(self) -> usize {
                self as usize
            }
        }
    };
}
pub(crate) use counted;

/// How often each was seen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Counts<T> {
    seen: Vec<u64>,
    of: PhantomData<T>,
}

impl<T: Counted> Default for Counts<T> {
    fn default() -> Self {
        Self {
            seen: vec![0; T::NAMES.len()],
            of: PhantomData,
        }
    }
}

impl<T: Counted> Counts<T> {
    pub fn note(&mut self, kind: T) {
        self.note_many(kind, 1);
    }

    pub fn note_many(&mut self, kind: T, times: u64) {
        self.seen[kind.index()] += times;
    }

    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.seen.iter_mut().zip(&other.seen) {
            *sum += more;
        }
    }

    pub fn of(&self, index: usize) -> u64 {
        self.seen[index]
    }

    pub fn sum(&self) -> u64 {
        self.seen.iter().sum()
    }

    /// Each name and how often it was seen.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        T::NAMES.iter().copied().zip(self.seen.iter().copied())
    }
}

/// One line each.
impl<T: Counted> fmt::Display for Counts<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, seen) in self.named() {
            writeln!(f, "  {name:<56}{seen:>12}")?;
        }
        Ok(())
    }
}
