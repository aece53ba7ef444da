//! The stable and the unstable tree: which page stands for a content.

use super::capture::Id;

/// No node, no page.
pub(super) const NONE: u32 = u32::MAX;

/// A merged page. A content has several when one may not have all the mappings (`stable_node` and its dups).
#[derive(Clone, Copy, Debug)]
struct Node {
    content: Id,
    /// Records that hang on it, those of pages written since and not yet visited included.
    items: u32,
    /// Mappings that are still there. Without any the page is gone, and nothing joins it.
    mapped: u32,
    /// The next node of the same content.
    next: u32,
}

/// What one content has in the trees.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// First node of the stable tree.
    stable: u32,
    /// Page in the unstable tree, if `pass` is this one.
    unstable: u32,
    pass: u32,
}

/// Both trees.
#[derive(Clone, Debug)]
pub(super) struct Trees {
    places: Vec<Place>,
    nodes: Vec<Node>,
    free: Vec<u32>,
    max_page_sharing: u32,
    /// Nodes with items.
    pub(super) shared: u64,
    /// Items beyond the first of each node.
    pub(super) sharing: u64,
}

impl Trees {
    pub(super) fn new(contents: usize, max_page_sharing: u32) -> Self {
        Self {
            places: vec![Place { stable: NONE, unstable: NONE, pass: 0 }; contents],
            nodes: Vec::new(),
            free: Vec::new(),
            max_page_sharing: max_page_sharing.max(2),
            shared: 0,
            sharing: 0,
        }
    }

    /// The node that a page with this content may join.
    pub(super) fn with_room(&mut self, content: Id) -> Option<u32> {
        let (mut before, mut at) = (NONE, self.places[content as usize].stable);
        while at != NONE {
            let node = self.nodes[at as usize];
            if node.mapped > 0 && node.items < self.max_page_sharing {
                // What can take one more after this one goes to the front, as in the kernel: long chains of full
                // nodes are then not walked for each page.
                if before != NONE && node.items + 1 < self.max_page_sharing {
                    self.nodes[before as usize].next = node.next;
                    self.push_front(content, at);
                }
                return Some(at);
            }
            (before, at) = (at, node.next);
        }
        None
    }

    /// A new node without mappings, first of its content.
    pub(super) fn new_node(&mut self, content: Id) -> u32 {
        let node = Node { content, items: 0, mapped: 0, next: NONE };
        let at = match self.free.pop() {
            Some(at) => {
                self.nodes[at as usize] = node;
                at
            }
            None => {
                self.nodes.push(node);
                u32::try_from(self.nodes.len() - 1).expect("fewer nodes than pages, which 32 bits count")
            }
        };
        self.push_front(content, at);
        at
    }

    fn push_front(&mut self, content: Id, at: u32) {
        let place = &mut self.places[content as usize];
        self.nodes[at as usize].next = place.stable;
        place.stable = at;
    }

    /// One more mapping of the node.
    pub(super) fn join(&mut self, at: u32) {
        let node = &mut self.nodes[at as usize];
        if node.items == 0 {
            self.shared += 1;
        } else {
            self.sharing += 1;
        }
        node.items += 1;
        node.mapped += 1;
    }

    /// A mapping of the node was written or went away; its record stays until ksmd comes by.
    pub(super) fn unmap(&mut self, at: u32) {
        self.nodes[at as usize].mapped -= 1;
    }

    /// ksmd takes a record off the node.
    pub(super) fn leave(&mut self, at: u32) {
        let node = &mut self.nodes[at as usize];
        node.items -= 1;
        if node.items > 0 {
            self.sharing -= 1;
            return;
        }
        self.shared -= 1;
        let Node { content, next, .. } = *node;
        let first = &mut self.places[content as usize].stable;
        if *first == at {
            *first = next;
        } else {
            let mut before = *first;
            while self.nodes[before as usize].next != at {
                before = self.nodes[before as usize].next;
            }
            self.nodes[before as usize].next = next;
        }
        self.free.push(at);
    }

    /// The page of this content in the unstable tree of this pass.
    pub(super) fn unstable(&self, content: Id, pass: u32) -> Option<u32> {
        let place = self.places[content as usize];
        (place.pass == pass).then_some(place.unstable)
    }

    /// Puts a page into the unstable tree of this pass.
    pub(super) fn insert_unstable(&mut self, content: Id, pass: u32, page: u32) {
        let place = &mut self.places[content as usize];
        (place.unstable, place.pass) = (page, pass);
    }
}
