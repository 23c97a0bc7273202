//! Frames that were read ahead, in memory until they are asked for: else a sequential reader would wait until they are on
//! the cache device, and read them from there.
//!
//! **Invariant:** of so many bytes at most; the oldest go first. What a frame holds never changes.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasherDefault;

use bytes::Bytes;
use quarry_cache::{Branch, Mutation, NameHasher};
use quarry_objfmt::{ChunkId, ChunkSeq, VolumeId};

/// A group's frame: the group, the chunk, and the frame's index there.
pub type FrameName = (u32, ChunkId, u32);

#[derive(Debug)]
struct Kept {
    raw: Bytes,
    /// Which coming of this name it is: it may have gone and come again.
    coming: u64,
}

type Frames = HashMap<FrameName, Kept, BuildHasherDefault<NameHasher>>;

/// Frames by their names. See the module's words.
#[derive(Debug)]
pub struct KeptFrames {
    frames: Frames,
    /// Names in the order in which they came; some of these comings may be over.
    order: VecDeque<(FrameName, u64)>,
    comings: u64,
    bytes: usize,
    bytes_max: usize,
}

impl KeptFrames {
    /// With room for `bytes_max` bytes.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self {
            frames: Frames::default(),
            order: VecDeque::new(),
            comings: 0,
            bytes: 0,
            bytes_max,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(crate) fn get(&self, name: &FrameName) -> Option<&Bytes> {
        self.frames.get(&found_as(*name)).map(|kept| &kept.raw)
    }

    pub(crate) fn keep(&mut self, name: FrameName, raw: Bytes) {
        let (name, len) = (found_as(name), raw.len());
        if len > self.bytes_max || self.frames.contains_key(&name) {
            return;
        }
        while self.bytes + len > self.bytes_max {
            let oldest = self.order.pop_front();
            let (oldest, coming) = oldest.expect("each frame has its name in the order");
            if is_there(&self.frames, &oldest, coming) {
                Branch::KeptPushedOut.taken();
                self.forget(&oldest);
            }
        }
        // Comings that are over are not to outnumber those that are not.
        if self.order.len() > 2 * self.frames.len() {
            let frames = &self.frames;
            self.order
                .retain(|(name, coming)| is_there(frames, name, *coming));
        }
        self.comings += 1;
        let coming = self.comings;
        self.frames.insert(name, Kept { raw, coming });
        self.order.push_back((name, coming));
        self.bytes += len;
    }

    /// Forgets all of the chunks of `volume` that are kept for `group`. Answers how many bytes they were.
    pub fn evict(&mut self, group: u32, volume: VolumeId) -> u64 {
        let before = self.bytes;
        let bytes = &mut self.bytes;
        self.frames.retain(|(of, chunk, _), kept| {
            let stays = *of != group || chunk.volume != volume;
            *bytes -= if stays { 0 } else { kept.raw.len() };
            stays
        });
        (before - self.bytes) as u64
    }

    pub(crate) fn forget(&mut self, name: &FrameName) {
        if let Some(kept) = self.frames.remove(&found_as(*name)) {
            self.bytes -= kept.raw.len();
        }
    }
}

fn is_there(frames: &Frames, name: &FrameName, coming: u64) -> bool {
    frames.get(name).is_some_and(|kept| kept.coming == coming)
}

fn found_as(name: FrameName) -> FrameName {
    let (group, mut chunk, index) = name;
    if Mutation::KeptOfAnyChunk.is_on() {
        chunk.seq = ChunkSeq::new(0);
    }
    (group, chunk, index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use quarry_objfmt::Epoch;

    fn name(index: u32) -> FrameName {
        let chunk = ChunkId {
            volume: VolumeId::from_bytes([7; 16]),
            epoch: Epoch::new(1),
            seq: ChunkSeq::new(1),
        };
        (0, chunk, index)
    }

    #[test]
    fn kept_frames_stay_within_their_bytes_the_oldest_go_first() {
        let mut kept = KeptFrames::new(3 * 512);
        for index in 0..4 {
            kept.keep(name(index), Bytes::from(vec![0; 512]));
        }
        assert!(kept.get(&name(0)).is_none());
        assert!((1..4).all(|index| kept.get(&name(index)).is_some()));
        kept.keep(name(9), Bytes::from(vec![0; 4 * 512]));
        assert!(kept.get(&name(9)).is_none(), "larger than all of it");
    }

    #[test]
    fn volume_evicted_leaves_what_is_of_others() {
        let mut kept = KeptFrames::new(8 * 512);
        let (_, chunk, _) = name(0);
        kept.keep(name(0), Bytes::from(vec![0; 512]));
        kept.keep((1, chunk, 0), Bytes::from(vec![0; 512]));
        assert_eq!(kept.evict(0, chunk.volume), 512);
        assert_eq!(kept.evict(0, chunk.volume), 0);
        assert!(kept.get(&name(0)).is_none());
        assert!(kept.get(&(1, chunk, 0)).is_some());
        assert_eq!(kept.bytes, 512);
    }

    #[test]
    fn names_of_forgotten_frames_do_not_pile_up() {
        let mut kept = KeptFrames::new(8 * 512);
        for index in 0..1000 {
            kept.keep(name(index), Bytes::from(vec![0; 512]));
            kept.forget(&name(index));
        }
        assert!(kept.is_empty());
        assert_eq!(kept.bytes, 0);
        assert!(kept.order.len() <= 2, "{}", kept.order.len());
        // The same few again and again.
        for index in 0..1000 {
            kept.keep(name(index % 4), Bytes::from(vec![0; 512]));
            if index % 4 == 3 {
                (0..4).for_each(|index| kept.forget(&name(index)));
            }
            assert!(kept.order.len() <= 10, "{}", kept.order.len());
        }
    }

    #[test]
    fn frame_that_came_again_is_as_old_as_its_second_coming() {
        let mut kept = KeptFrames::new(3 * 512);
        let frame = || Bytes::from(vec![0; 512]);
        kept.keep(name(0), frame());
        kept.keep(name(1), frame());
        kept.forget(&name(0));
        kept.keep(name(2), frame());
        kept.keep(name(0), frame());
        kept.keep(name(3), frame());
        assert!(kept.get(&name(1)).is_none(), "the oldest");
        assert!(
            [0, 2, 3]
                .iter()
                .all(|index| kept.get(&name(*index)).is_some())
        );
    }
}
