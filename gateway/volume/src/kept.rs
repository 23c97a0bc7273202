//! Frames that were read ahead, in memory until they are asked for: else a sequential reader would wait until they are on
//! the cache device, and read them from there.
//!
//! **Invariant:** of so many bytes at most; the oldest go first. What a frame holds never changes.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasherDefault;

use bytes::Bytes;
use quarry_cache::NameHasher;
use quarry_objfmt::{ChunkId, VolumeId};

/// A group's frame: the group, the chunk, and the frame's index there.
pub type FrameName = (u32, ChunkId, u32);

/// Frames by their names. See the module's words.
#[derive(Debug)]
pub struct KeptFrames {
    frames: HashMap<FrameName, Bytes, BuildHasherDefault<NameHasher>>,
    /// Names in the order in which they came; some may be gone.
    order: VecDeque<FrameName>,
    bytes: usize,
    bytes_max: usize,
}

impl KeptFrames {
    /// With room for `bytes_max` bytes.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self {
            frames: HashMap::default(),
            order: VecDeque::new(),
            bytes: 0,
            bytes_max,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(crate) fn get(&self, name: &FrameName) -> Option<&Bytes> {
        self.frames.get(name)
    }

    pub(crate) fn keep(&mut self, name: FrameName, raw: Bytes) {
        let len = raw.len();
        if len > self.bytes_max || self.frames.contains_key(&name) {
            return;
        }
        while self.bytes + len > self.bytes_max {
            let oldest = self.order.pop_front();
            self.forget(&oldest.expect("each frame has its name in the order"));
        }
        self.frames.insert(name, raw);
        self.bytes += len;
        // Names of frames that are gone are not to outnumber those that are there.
        if self.order.len() > 2 * self.frames.len() {
            let frames = &self.frames;
            self.order.retain(|name| frames.contains_key(name));
        }
        self.order.push_back(name);
    }

    /// Forgets all of the chunks of `volume` that are kept for `group`. Answers how many bytes they were.
    pub fn evict(&mut self, group: u32, volume: VolumeId) -> u64 {
        let before = self.bytes;
        let bytes = &mut self.bytes;
        self.frames.retain(|(of, chunk, _), raw| {
            let stays = *of != group || chunk.volume != volume;
            *bytes -= if stays { 0 } else { raw.len() };
            stays
        });
        (before - self.bytes) as u64
    }

    pub(crate) fn forget(&mut self, name: &FrameName) {
        if let Some(raw) = self.frames.remove(name) {
            self.bytes -= raw.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quarry_objfmt::{ChunkSeq, Epoch};

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
    }
}
